"""Laws of a step: no token is lost, nothing leaks, the loss equals the reference, untrainable setups are refused."""

from __future__ import annotations

import copy
import math
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.conftest import byte_level_tokenizer, tiny_llama, tiny_moe
from tests.laws.packed_batches import packed_model, random_store
from tongwen.core.errors import ModelError, NumbersError, RecipeError
from tongwen.data.sampling import order
from tongwen.data.token_store import TokenStore
from tongwen.model.adapters.attach import find_untrained_rows, make_trainable
from tongwen.model.kernels import loss as score
from tongwen.model.kernels import packed_attention
from tongwen.model.kernels.fused_blocks import FusedGatedMlp, FusedRmsNorm, fuse_blocks
from tongwen.model.kernels.fused_projections import FusedProjections, FusedProjectionsFunction
from tongwen.model.kernels.loss import LearnedCrossEntropy, bits_per_byte, learned_loss, use_blockwise_head
from tongwen.model.loading.load import load_model
from tongwen.model.loading.model_ref import ModelRef
from tongwen.recipe.fields import Duration
from tongwen.recipe.training import AdapterConfig
from tongwen.train import audit
from tongwen.train.packing import MicroBatches, best_fit, deal, make_plan, pack, pad


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(path, len(byte_level_tokenizer(path)))
    return path


def plan_for(store: TokenStore, **options: Any):
    choices = {"batch_size": 8, "stop_after": Duration(count=2, unit="epochs"), "budget": 64, "world": 1} | options
    return make_plan(store.lengths, lambda epoch: order(len(store), 42, "epoch", epoch), **choices)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_packing_keeps_every_sample_and_the_steps(budget: int, world: int) -> None:
    store = random_store(53)
    plan = plan_for(store, budget=budget, world=world)
    assert plan.steps == plan_for(store).steps
    assert plan.steps_per_epoch == 7
    for epoch in range(2):
        samples = [sample for step in plan.steps[7 * epoch : 7 * epoch + 7] for sample in step]
        assert sorted(samples) == list(range(53))
    assert plan.steps[:7] != plan.steps[7:]
    for step, micro in zip(plan.steps, plan.micro, strict=True):
        assert len(micro) % world == 0
        assert sorted(sample for part in micro for sample in part) == sorted(step)
        sizes = [int(store.lengths[list(part)].sum()) for part in micro]
        assert max(sizes) <= plan.budget
    batches = MicroBatches(store, plan.flat(), packed=True)
    assert sum(batches[index]["tokens"] for index in range(len(batches))) == 2 * len(store.ids)
    assert sum(batches[index]["learned"] for index in range(len(batches))) == 2 * store.learned_tokens


@pytest.mark.parametrize("world", [1, 3])
def test_uniform_plan_has_the_parts_of_version_0_1(world: int) -> None:
    store = random_store(53)
    plan, per_step = (plan_for(store, budget=50, world=world, uniform=uniform) for uniform in (True, False))
    assert len({*plan.slots}) == 1 < len({*per_step.slots}) and plan.accumulate >= per_step.accumulate
    for count in range(1, 9):  # version 0.1: the first number of parts with which every step stays within the budget
        micro = tuple(deal(step, store.lengths, count * world) for step in plan.steps)
        if all(store.lengths[list(part)].sum() <= plan.budget for step in micro for part in step):
            break
    assert plan.micro == micro


def test_every_step_has_the_fewest_micro_batches() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.8, 10_000), 8, 2048).astype(np.int64)
    plan = make_plan(
        lengths,
        lambda epoch: order(len(lengths), 42, "epoch", epoch),
        batch_size=1024,
        stop_after=Duration(count=1, unit="epochs"),
        budget=4096,
    )
    assert plan.fill(lengths) > 0.95
    for step, slots in zip(plan.steps, plan.slots, strict=True):
        assert slots <= -(-int(lengths[list(step)].sum()) // 4096) + 1


def test_stop_after_counts_steps_tokens_and_part_epochs() -> None:
    store = random_store(53)
    assert len(plan_for(store, stop_after=Duration(count=10, unit="steps"))) == 10
    assert len(plan_for(store, stop_after=Duration(count=0.5, unit="epochs"))) == 4
    plan = plan_for(store, stop_after=Duration(count=300, unit="tokens"))
    tokens = np.cumsum(plan.tokens_of(store.lengths))
    assert tokens[-1] >= 300 > (tokens[-2] if len(tokens) > 1 else 0)


def test_deal_balances_tokens() -> None:
    lengths = np.array([9, 8, 7, 6, 5, 4])
    sizes = [int(lengths[list(part)].sum()) for part in deal((0, 1, 2, 3, 4, 5), lengths, 3)]
    assert sizes == [13, 13, 13]


def reference(model: Any, store: TokenStore) -> tuple[float, int]:
    """Return the nats summed over learned tokens, one sample at a time, with standard attention and the full head."""
    total, count = 0.0, 0
    for index in range(len(store)):
        ids, learn = store.sample(index)
        ids = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        places = np.flatnonzero(learn)
        total += float(cross_entropy(logits[places - 1].double(), ids[places], reduction="sum"))
        count += len(places)
    return total, count


@pytest.mark.parametrize("maker", [pack, pad])
def test_packed_and_padded_loss_match_the_reference(folder: Path, maker: Any) -> None:
    store = random_store(12)
    model = packed_model(folder) if maker is pack else load_model(ModelRef("t", str(folder)), torch.float32)
    batch = maker([store.sample(index) for index in range(12)])
    total, each = learned_loss(model, batch)
    wanted, count = reference(load_model(ModelRef("t", str(folder)), torch.float32), store)
    assert len(each) == count == batch["learned"]
    assert float(total.detach()) / count == pytest.approx(wanted / count, abs=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_loss_and_gradient_match_torch(weight: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(600, 50, dtype=torch.float32)
    targets = torch.randint(0, 50, (600,))
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    total, nats = LearnedCrossEntropy.apply(ours * 1.0, targets, 0.5)
    (total * weight).backward()
    wanted = cross_entropy(theirs, targets, reduction="none")
    assert float(total.detach()) == pytest.approx(float(wanted.detach().sum()) / 2, rel=1e-6)
    (wanted.sum() * weight / 2).backward()
    assert torch.allclose(nats, wanted, atol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


@pytest.mark.parametrize("maker", [pack, pad])
def test_blockwise_head_gives_the_same_loss_and_gradients(
    folder: Path, maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of rows, the last of them shorter."""
    monkeypatch.setattr(score, "HEAD_ROWS", {"cpu": 7})
    store = random_store(6)
    batch = maker([store.sample(index) for index in range(6)])
    model = fused(
        packed_model(folder) if maker is pack else load_model(ModelRef("t", str(folder)), torch.float32), LORA
    )
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "lora_B" in name:
                part.copy_(torch.randn_like(part) * 0.1)
    wanted, theirs = loss_and_gradients(model, batch)
    assert use_blockwise_head(model, batch) and "HeadLoss" in operations(model, batch)
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert all(torch.allclose(one, theirs[name], rtol=1e-4, atol=1e-6) for name, one in gradients.items())
    with torch.no_grad():
        assert torch.equal(learned_loss(model, batch)[1], learned_loss(model, batch, 0.5)[1])
    head = model.get_output_embeddings()
    assert head(head.weight[:1]).shape == (1, len(head.weight)), "outside of the loss it is a head as before"


def test_trained_or_capped_head_is_not_blockwise(folder: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    batch = pack([random_store(2).sample(index) for index in range(2)])
    assert not use_blockwise_head(make_trainable(packed_model(folder), AdapterConfig(method="full"), []).model, batch)
    rows = make_trainable(packed_model(folder), LORA, [1, 2]).model  # tied, so the head learns these rows too
    assert not use_blockwise_head(rows, batch)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=500, num_key_value_heads=1, head_dim=16, **shape))
    batch = pad([random_store(2).sample(index) for index in range(2)])
    assert not use_blockwise_head(make_trainable(gemma, LORA, []).model, batch), "its logits are capped"


def test_bits_per_byte_matches_its_definition(folder: Path) -> None:
    store = random_store(5)
    model = packed_model(folder)
    sizes = torch.ones(500, dtype=torch.int32) * 2
    sizes[store.ids[store.spans[0, 0]]] = 0  # one token is special: in neither sum
    batch = pack([store.sample(index) for index in range(5)])
    scores = bits_per_byte(model, [batch], sizes)
    _, nats = learned_loss(model, batch)
    counted = sizes[batch["targets"]] > 0
    assert not counted.all()
    wanted = float(nats[counted].sum()) / (math.log(2) * 2 * int(counted.sum()))
    assert scores["bits_per_byte"] == pytest.approx(wanted, rel=1e-6)
    assert scores["loss"] == pytest.approx(float(nats.mean()), rel=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_documents_attention_matches_separate_documents(window: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    together, _ = packed_attention.documents_attention(
        None, query, key, value, None, cu_seq_lens_q=borders, sliding_window=window
    )  # type: ignore[arg-type]
    assert together.is_contiguous(), "a model may take a view of it"
    for begin, end in ((0, 5), (5, 12)):
        keys, values = (part[:, :, begin:end].repeat_interleave(2, dim=1) for part in (key, value))
        scores = query[:, :, begin:end] @ keys.transpose(2, 3) / 8**0.5
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = (distance < 0) | (distance >= (window or 99))
        wanted = (scores.masked_fill(hidden, -math.inf).softmax(-1) @ values).transpose(1, 2)
        assert torch.allclose(together[:, begin:end], wanted, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (2, 1)])
def test_bf16_attention_is_as_close_to_fp32_as_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    heads, groups = shape
    parts = [2 * torch.randn(1, 340, count, 16).transpose(1, 2) for count in (heads, groups, groups)]
    borders = torch.tensor([0, 1, 40, 340], dtype=torch.int32)  # less and more than a block

    def through(kind: torch.dtype) -> list[torch.Tensor]:
        given = [part.to(kind).detach().requires_grad_() for part in parts]
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            out, _ = packed_attention.documents_attention(None, *given, None, cu_seq_lens_q=borders)  # type: ignore[arg-type]
        out.float().sin().sum().backward()
        return [out.float().detach(), *(part.grad.float() for part in given)]

    wanted, found = through(torch.float32), through(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "SHORT", 0)
        torchs = through(torch.bfloat16)
    assert not torch.equal(found[0], torchs[0])
    for one, other, right in zip(found, torchs, wanted, strict=True):
        assert (one - right).norm() <= 1.25 * (other - right).norm() < 0.05 * right.norm()


def flash(
    query: torch.Tensor,  # (T, heads, width)
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Reference implementation of torch's documented `varlen_attn`."""
    assert max_q == max_k == int(cu_seq_q.diff().max()) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    before, after = (reach if reach >= 0 else max_q for reach in window_size)
    keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    of = torch.bucketize(torch.arange(len(query)), cu_seq_q, right=True)  # the document of each token
    back = torch.arange(len(query))[:, None] - torch.arange(len(query))
    hidden = (of[:, None] != of) | (back > before) | (-back > after)
    scores = torch.einsum("qhw,khw->hqk", query, keys) * (scale or query.shape[-1] ** -0.5)
    return torch.einsum("hqk,khw->qhw", scores.masked_fill(hidden, -math.inf).softmax(-1), values)


@pytest.mark.parametrize("window", [None, 1, 3, 99])
def test_batched_attention_matches_separate_documents(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the GPU path with the CPU path: outputs and gradients, with grouped heads, scale and window."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, heads, 12, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    kwargs: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "max_length_q": 7}
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)

    def both() -> list[torch.Tensor]:
        out, _ = packed_attention.documents_attention(None, *parts, None, cu_seq_lens_q=borders, **kwargs)  # type: ignore[arg-type]
        return [out, *torch.autograd.grad(out.square().sum(), parts)]

    alone = both()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    monkeypatch.setattr(packed_attention, "_suits_flash", lambda query, value, computed_in: True)
    monkeypatch.setattr(packed_attention, "scaled_dot_product_attention", None)
    for found, wanted in zip(both(), alone, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_torch_attention_accepts_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check arguments and shapes on fake tensors, forward and backward, in autocast's dtype."""
    monkeypatch.setattr(
        packed_attention, "_suits_flash", lambda query, value, computed_in: computed_in == torch.bfloat16
    )
    parts = [torch.empty(1, heads, 12, 8, device="meta", requires_grad=True) for heads in (4, 2, 2)]
    borders = torch.empty(3, dtype=torch.int32, device="meta")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "meta")
    kwargs: dict[str, Any] = {"cu_seq_lens_q": borders, "max_length_q": 7, "sliding_window": 3}
    out, _ = packed_attention.documents_attention(None, *parts, None, **kwargs)  # type: ignore[arg-type]
    assert out.shape == (1, 12, 4, 8) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert [part.grad.shape for part in parts if part.grad is not None] == [part.shape for part in parts]


def test_flash_attention_is_used_only_where_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        is_cuda, device = True, "cuda"

        def __init__(self, width: int) -> None:
            self.shape = (1, 4, 12, width)

    def suits(width: int = 64, kind: torch.dtype = torch.bfloat16, of_value: int = 0) -> bool:
        return packed_attention._suits_flash(Gpu(width), Gpu(of_value or width), kind)  # type: ignore[arg-type]

    capability = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    assert suits() and suits(256) and suits(kind=torch.float16)
    assert not suits(kind=torch.float32) and not suits(264) and not suits(60) and not suits(192, of_value=128)
    capability[0] = (7, 5)
    assert not suits(), "no flash attention before Ampere"
    assert not packed_attention._suits_flash(torch.empty(1, 4, 12, 64), torch.empty(1, 4, 12, 64), torch.bfloat16)


def test_attention_without_boundaries_or_with_softcap_raises() -> None:
    part = torch.randn(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        packed_attention.documents_attention(None, part, part, part, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="softcap"):
        packed_attention.documents_attention(
            None, part, part, part, None, cu_seq_lens_q=torch.tensor([0, 2]), softcap=30.0
        )  # type: ignore[arg-type]


def test_audit_detects_leaking_documents(folder: Path) -> None:
    store = random_store(2, longest=30)
    samples = [store.sample(0), store.sample(1)]
    assert audit.check_isolation(packed_model(folder), samples, learned_loss) < 1e-4

    def leaking(model: Any, batch: dict[str, Any]) -> Any:
        whole = torch.tensor([0, batch["input_ids"].shape[1]], dtype=torch.int32)
        return learned_loss(model, {**batch, "cu_seq_lens_q": whole})

    with pytest.raises(NumbersError, match="see each other") as caught:
        audit.check_isolation(packed_model(folder), samples, leaking)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    "choice",
    [
        AdapterConfig(rank=4),
        AdapterConfig(rank=4, dora=True),
        AdapterConfig(rank=4, rslora=True, also_train=["embed_tokens"]),
        AdapterConfig(method="full"),
    ],
)
def test_gradient_probe_passes_healthy_models_without_side_effects(folder: Path, choice: AdapterConfig) -> None:
    model = make_trainable(packed_model(folder), choice, []).model
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    store = random_store(4)
    assert audit.probe_gradients(model, pack([store.sample(index) for index in range(4)]), learned_loss) == []
    assert torch.equal(state, torch.get_rng_state())
    assert all(part.grad is None for part in model.parameters())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_gradient_probe_refuses_untrainable_setups(folder: Path) -> None:
    store = random_store(4)
    batch = pack([store.sample(index) for index in range(4)])

    def detached(
        model: Any, inputs: dict[str, Any]
    ) -> Any:  # F-01, and F-02 where the leaf is made to require a gradient
        total, nats = learned_loss(model, inputs)
        return total.detach().requires_grad_(), nats

    model = make_trainable(packed_model(folder), AdapterConfig(rank=4), []).model
    with pytest.raises(NumbersError, match=r"get no gradient"):
        audit.probe_gradients(model, batch, detached)
    with pytest.raises(NumbersError, match="does not depend on any trainable"):
        audit.probe_gradients(
            model, batch, lambda model, inputs: tuple(part.detach() for part in learned_loss(model, inputs))
        )
    frozen = make_trainable(packed_model(folder), AdapterConfig(rank=4), []).model.requires_grad_(False)
    with pytest.raises(NumbersError, match="no parameter is trainable"):
        audit.probe_gradients(frozen, batch, learned_loss)
    broken = make_trainable(packed_model(folder), AdapterConfig(rank=4), []).model
    with torch.no_grad():
        next(part for name, part in broken.named_parameters() if name.endswith("norm.weight")).fill_(math.nan)
    with pytest.raises(NumbersError, match="first loss is nan"):
        audit.probe_gradients(broken, batch, learned_loss)
    dead = make_trainable(packed_model(folder), AdapterConfig(rank=4), []).model
    dead.register_parameter("unused", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(NumbersError, match=r"unused[\s\S]*get no gradient"):
        audit.probe_gradients(dead, batch, learned_loss)


def test_unknown_targets_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"'c_attn'[\s\S]*q_proj"):
        make_trainable(packed_model(folder), AdapterConfig(targets=["c_attn"]), [])
    with pytest.raises(ModelError, match="'wte'"):
        make_trainable(packed_model(folder), AdapterConfig(also_train=["wte"]), [])
    adapted = make_trainable(packed_model(folder), AdapterConfig(targets="family", rank=2), [])
    assert {
        name.split(".lora_")[0].split(".")[-1] for name, part in adapted.model.named_parameters() if part.requires_grad
    } == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_untrained_embedding_rows_are_found(folder: Path) -> None:
    model = packed_model(folder)
    assert find_untrained_rows(model, [0, 1, 2]) == []
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[1] = 0
        weight[2] = weight[250]
    assert find_untrained_rows(model, [0, 1, 2]) == [1, 2]
    adapted = make_trainable(model, AdapterConfig(rank=2), [1, 2])
    assert any("trainable_tokens" in name for name, part in adapted.model.named_parameters() if part.requires_grad)


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total, _ = learned_loss(model, batch)
    total.backward()
    gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.requires_grad}
    return float(total.detach()), gradients


def with_fast_forward(model: Any) -> list[Any]:
    return [module for module in model.modules() if "forward" in vars(module)]


LORA = AdapterConfig(rank=4)


def fused(model: Any, choice: AdapterConfig) -> Any:
    """Return the adapted model with fused layers, as one process trains it on a CPU."""
    adapted = make_trainable(model, choice, []).model
    fuse_blocks(adapted)
    return adapted


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "choice", [AdapterConfig(rank=4), AdapterConfig(rank=4, rslora=True), AdapterConfig(rank=4, targets="family")]
)
@pytest.mark.parametrize("blocks", [False, True])
def test_fused_kernels_match_peft_and_transformers(
    folder: Path, choice: AdapterConfig, checkpointing: bool, blocks: bool
) -> None:
    model = fused(packed_model(folder), choice) if blocks else make_trainable(packed_model(folder), choice, []).model
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "lora_B" in name:
                part.copy_(torch.randn_like(part) * 0.1)
            elif "norm" in name:
                part.copy_(torch.rand_like(part) + 0.5)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    store = random_store(6)
    batch = pack([store.sample(index) for index in range(6)])
    fast = with_fast_forward(model)
    kinds = Counter(type(module).__name__ for module in fast)
    family = choice.targets == "family"
    wanted_blocks = ({"LlamaRMSNorm": 5} if family else {"LlamaRMSNorm": 5, "LlamaMLP": 2}) if blocks else {}
    assert kinds == {"Linear": 8 if family else 14, **wanted_blocks}
    used = operations(model, batch)
    assert ("FusedProjectionsFunction" in used, "FusedLoraFunction" in used) == (blocks, not blocks)
    loss, gradients = loss_and_gradients(model, batch)
    for module in fast:
        del module.forward
    wanted, theirs = loss_and_gradients(model, batch)
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert gradients.keys() == theirs.keys() and any(bool(one.any()) for one in theirs.values())
    assert all(torch.allclose(one, theirs[name], rtol=1e-4, atol=1e-5) for name, one in gradients.items())


@pytest.mark.parametrize("small", [1.0, 1e-3])
def test_fused_kernels_pass_gradcheck(small: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 6, dtype=torch.float64) * small).requires_grad_()
    weight = torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda part: FusedRmsNorm.apply(part, weight, 1e-5), (x,), eps=1e-7 * small)
    shapes = [(8, 6), (2, 6), (8, 2), (8, 6), (3, 6), (8, 3), (6, 8), (2, 8), (6, 2)]
    made = [torch.randn(shape, dtype=torch.float64).requires_grad_(index % 3 > 0) for index, shape in enumerate(shapes)]
    parts = [(*made[begin : begin + 3], scale) for begin, scale in ((0, 2.0), (3, 0.5), (6, 3.0))]
    adapters = [one for _, a, b, _ in parts for one in (a, b)]
    first, last = FusedProjections(parts[:2]), FusedProjections(parts[2:])

    def taken(x: torch.Tensor, *moved: torch.Tensor) -> tuple[float, ...]:
        """Pass the adapters that finite differences have changed to the fused projections."""
        pairs = zip(moved[::2], moved[1::2], strict=True)
        now = [(weight, *pair, scale) for (weight, *_, scale), pair in zip(parts, pairs, strict=False)]
        first.load_adapters(now[:2])
        last.load_adapters(now[2:])
        return tuple(scale for *_, scale in parts)

    assert torch.autograd.gradcheck(
        lambda *all: FusedGatedMlp.apply(all[0], first, last, taken(*all), *all[1:]), (x, *adapters)
    )

    def projected(x: torch.Tensor, *four: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scales = taken(x, *four, *adapters[4:])[:2]
        out: tuple[torch.Tensor, ...] = FusedProjectionsFunction.apply(x, first, scales, *four)
        return tuple(part.mul_(3) for part in out)  # a model may change an output in place

    assert torch.autograd.gradcheck(projected, (x, *adapters[:4]))


def test_joined_layers_share_storage_and_save_unchanged(folder: Path) -> None:
    plain = packed_model(folder)
    before = {name: part.clone() for name, part in plain.state_dict().items()}
    model = fused(plain, AdapterConfig(rank=4))
    packed_attention, mlp = model.base_model.model.model.layers[0].self_attn, model.base_model.model.model.layers[0].mlp
    for layers in (
        (packed_attention.q_proj, packed_attention.k_proj, packed_attention.v_proj),
        (mlp.gate_proj, mlp.up_proj),
    ):
        assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    after = {
        name.replace("base_layer.", "").removeprefix("base_model.model."): part
        for name, part in model.state_dict().items()
    }
    assert all(torch.equal(after[name], part) for name, part in before.items())


def test_unsupported_layers_stay_with_peft(folder: Path) -> None:
    for choice in (AdapterConfig(rank=4, dora=True), AdapterConfig(rank=4, dropout=0.1)):
        fast = with_fast_forward(fused(packed_model(folder), choice))
        assert {type(module).__name__ for module in fast} == {"LlamaRMSNorm"}
    assert not with_fast_forward(make_trainable(packed_model(folder), AdapterConfig(method="full"), []).model)


def test_disabled_adapter_gives_the_base_output(folder: Path) -> None:
    model = fused(packed_model(folder), AdapterConfig(rank=4))
    store = random_store(3)
    batch = pack([store.sample(index) for index in range(3)])
    with torch.no_grad():
        wanted, _ = learned_loss(packed_model(folder), batch)
        for name, part in model.named_parameters():
            if "lora_B" in name:
                part.fill_(0.3)
        changed, _ = learned_loss(model, batch)
        with model.disable_adapter():
            total, _ = learned_loss(model, batch)
    assert float(total) == pytest.approx(float(wanted), rel=1e-6) != pytest.approx(float(changed), rel=1e-3)


def test_unsupported_blocks_are_not_fused(tmp_path: Path) -> None:
    from transformers import GemmaConfig, GemmaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    gemma = GemmaForCausalLM(GemmaConfig(vocab_size=60, num_key_value_heads=1, head_dim=16, **shape))
    names = {type(module).__name__ for module in with_fast_forward(fused(gemma, AdapterConfig(rank=2)))}
    assert names == {"Linear"}  # its norm is 1 + weight, its MLP has GELU
    llama = tiny_llama(tmp_path, 60, hidden_act="gelu")
    names = {type(module).__name__ for module in with_fast_forward(fused(llama, AdapterConfig(rank=2)))}
    assert names == {"Linear", "LlamaRMSNorm"}


def test_fused_kernels_in_bf16_are_as_close_to_fp32(folder: Path) -> None:
    """bf16 weights and an fp32 adapter under autocast, as in a CPU run with bf16."""
    model = fused(packed_model(folder).to(torch.bfloat16), AdapterConfig(rank=4))
    with torch.no_grad():
        for name, part in model.named_parameters():
            if part.requires_grad:
                part.data = torch.randn_like(part, dtype=torch.float32) * 0.1 if "lora_B" in name else part.float()
    store = random_store(6)
    batch = pack([store.sample(index) for index in range(6)])
    fast = with_fast_forward(model)
    assert Counter(type(module).__name__ for module in fast) == {"Linear": 14, "LlamaRMSNorm": 5, "LlamaMLP": 2}
    with torch.autocast("cpu", torch.bfloat16):
        used = [
            name
            for name in ("FusedProjectionsFunction", "FusedGatedMlp", "FusedRmsNorm")
            if name in operations(model, batch)
        ]
        loss, gradients = loss_and_gradients(model, batch)
        for module in fast:
            del module.forward
        slow_loss, slow = loss_and_gradients(model, batch)
    assert used == ["FusedProjectionsFunction", "FusedGatedMlp", "FusedRmsNorm"]
    wanted_loss, wanted = loss_and_gradients(model.float(), batch)

    def distance(found: dict[str, torch.Tensor]) -> float:
        return float(sum((found[name] - one).square().sum() for name, one in wanted.items())) ** 0.5

    assert {part.dtype for part in gradients.values()} == {torch.float32}
    assert abs(loss - wanted_loss) <= max(2 * abs(slow_loss - wanted_loss), 1e-3 * wanted_loss)
    assert distance(gradients) <= 1.1 * distance(slow) < 0.1 * distance({name: 0 * one for name, one in wanted.items()})


def operations(model: Any, batch: dict[str, Any]) -> set[str]:
    """Return the names of the operations in the backward graph of a micro-batch."""
    total, _ = learned_loss(model, batch)
    names, open_ = set[str](), [total.grad_fn]
    seen = set(open_)
    while open_:
        node = open_.pop()
        names.add(node.name().removesuffix("Backward"))
        new = [one for one, _ in node.next_functions if one is not None and one not in seen]
        seen.update(new)
        open_ += new
    return names


@pytest.mark.sample()
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_reused_without_page_faults() -> None:
    script = """
import resource, torch
from tongwen.train.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = faults()
keep_freed_memory()
print(usual, min(faults() for _ in range(8)))  # the heap needs a few rounds to grow holes of the right size
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 4


def test_coverage_of_fused_experts_is_reported() -> None:
    passed = make_trainable(tiny_moe(), AdapterConfig(rank=2, targets=["q_proj"]), [])
    assert any(
        "does not cover 2 fused expert weights" in notice and "mlp.experts" in notice for notice in passed.notices
    )
    reached = make_trainable(tiny_moe(), AdapterConfig(rank=2), [])
    assert any("covers 2 fused expert weights" in notice for notice in reached.notices)
    assert any("experts" in name for name, part in reached.model.named_parameters() if part.requires_grad)


@pytest.mark.parametrize("capacity", [40, 64, 1000])
def test_best_fit_loses_no_sample_and_leaves_little_room(capacity: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 800)
    packs = best_fit(lengths, order(800, 1), capacity)
    assert sorted(sample for pack in packs for sample in pack) == list(range(800))
    sizes = [int(lengths[list(pack)].sum()) for pack in packs]
    assert max(sizes) <= capacity
    assert len(packs) <= -(-int(lengths.sum()) // capacity) * (1.04 if capacity == 40 else 1.01) + 1
    places = {sample: place for place, sample in enumerate(order(800, 1))}
    assert all(list(pack) == sorted(pack, key=places.get) for pack in packs)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_token_batches_cover_the_epoch(world: int) -> None:
    store = random_store(203)
    plan = plan_for(store, batch_tokens=256, budget=64, world=world)
    first = [sample for step in plan.steps[: plan.steps_per_epoch] for sample in step]
    assert sorted(first) == list(range(203))
    assert {*plan.slots[: plan.steps_per_epoch - 1]} == {plan.accumulate}
    assert max(plan.tokens_of(store.lengths)) <= 256
    assert plan.fill(store.lengths) > 0.9
    assert len(plan) == 2 * plan.steps_per_epoch


@pytest.mark.parametrize(("tokens", "world"), [(64, 4), (100, 2), (70, 1)])
def test_unreachable_batch_tokens_are_refused(tokens: int, world: int) -> None:
    store = random_store(50)
    longest = int(store.lengths.max())
    with pytest.raises(RecipeError) as refused:
        plan_for(store, batch_tokens=tokens, budget=32, world=world)
    text = refused.value.text()
    assert f"batch_tokens: {tokens}" in text and f"{world} processes" in text
    remedy = int(text.split("→ batch_tokens: ")[1].split(",")[0])
    assert remedy % world == 0 and remedy >= longest * world
    plan_for(store, batch_tokens=remedy, budget=32, world=world)
