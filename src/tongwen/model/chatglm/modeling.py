"""ChatGLM-6B: a prefix language model. Attention is bidirectional before `<sop>` and causal after it.

A token has two positions: its index in the prompt (after `<sop>`: the index of `[gMASK]`, which the answer replaces),
and its index in the answer (0 within the prompt). Half of each head is rotated by the first, half by the second.
Residuals are DeepNorm's: the scaled normalised state is added, not the state itself. The start of each answer is found
in the ids, so callers need not pass positions or a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from tongwen.model.chatglm.configuration import ChatGLMConfig

# DeepNorm's alpha for 28 layers. The original computes it from that number whatever the config says.
RESIDUAL_SCALE = math.sqrt(2 * 28)
Rotation = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        rotations: Sequence[Rotation],
        mask: torch.Tensor | None,
        past: Cache | None,
        **extra: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x: (B, L, hidden) -> the same shape, and the attention weights if the backend returns them."""
        fused = self.query_key_value(x).view(*x.shape[:-1], self.heads, 3 * self.width)
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)  # (B, heads, L, width) each
        query, key = rotated(query, rotations), rotated(key, rotations)
        if past is not None:
            key, value = past.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sdpa_attention_forward)
        out, weights = attend(self, query, key, value, mask, scaling=self.width**-0.5, is_causal=False, **extra)
        return self.dense(out.reshape(x.shape)), weights


class Mlp(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.dense_4h_to_h(gelu(self.dense_h_to_4h(x), approximate="tanh"))
        return out


class Block(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = Mlp(config)

    def forward(self, x: torch.Tensor, *arguments: Any, **extra: Any) -> torch.Tensor:
        inside = self.input_layernorm(x)
        x = inside * RESIDUAL_SCALE + self.attention(inside, *arguments, **extra)[0]
        inside = self.post_attention_layernorm(x)
        out: torch.Tensor = inside * RESIDUAL_SCALE + self.mlp(inside)
        return out


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # the start of an answer is found in the ids
    _input_embed_layer = "word_embeddings"
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq",)  # computed here


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, index) for index in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **extra: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states.

        input_ids:      (B, L)
        attention_mask: (B, tokens so far), 0 for padding
        cu_seq_lens_q:  document boundaries of a pack (1, T)
        position_ids:   (B, 2, L), needed only with a filled cache; other shapes, such as a pack's counter, are ignored
        Raises ValueError when the start of the answer cannot be found because there are no ids.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("ChatGLM-6B makes its own mask: attention_mask must be (batch, tokens)")
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        whole: Any = None  # mask of the bidirectional prefix; with a filled cache the causal mask is enough
        if past_key_values is None or not past_key_values.get_seq_length():
            if input_ids is None:
                raise ValueError(
                    "ChatGLM-6B reads off the ids where the answer begins: inputs_embeds alone will not do"
                )
            position_ids, prefix = read_layout(input_ids, attention_mask, cu_seq_lens_q, self.config)
            whole = _before(prefix)
            if cu_seq_lens_q is not None:
                extra |= {"cu_seq_lens_q": cu_seq_lens_q, "prefix_lengths": prefix}
        elif position_ids is None or position_ids.dim() != 3:
            raise ValueError("behind a cache ChatGLM-6B needs position_ids of shape (batch, 2, tokens)")
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            or_mask_function=whole,
        )
        rotations = [_rotation(places, self.config, x.dtype) for places in position_ids.unbind(1)]
        for layer in self.layers:
            x = layer(x, rotations, mask, past_key_values, **extra)
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(x), past_key_values=past_key_values)


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **extra: Any,
    ) -> CausalLMOutputWithPast:
        """labels: (B, L), shifted here; -100 is ignored. logits_to_keep: how many from the end, or which positions."""
        out = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **extra
        )
        positions_kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, positions_kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **extra)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Compute positions from all ids so far: a new token alone does not show where its answer began."""
        if not bool((input_ids == self.config.bos_token_id).any(dim=1).all()):
            raise ValueError("a prompt for ChatGLM-6B must end with [gMASK] <sop>; its tokenizer adds them")
        kwargs.pop("position_ids", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, **kwargs
        )
        positions, _ = read_layout(input_ids, attention_mask, None, self.config)
        inputs["position_ids"] = positions[..., -inputs["input_ids"].shape[1] :]
        return inputs


def read_layout(
    ids: torch.Tensor, mask: torch.Tensor | None, borders: torch.Tensor | None, config: ChatGLMConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (positions (B, 2, L), prefix lengths (B,); for a pack with borders (D + 1,): (D,)).

    The prefix is the part of a row or document with bidirectional attention. It includes padding on the left. A text
    without `<sop>` is all prefix.
    """
    if borders is not None:
        layouts = [_layout(part, 0, config) for part in ids[0].cpu().split(borders.diff().tolist())]
        positions = torch.cat([positions for positions, _ in layouts], dim=1)[None]
    else:
        padding = [0] * len(ids) if mask is None else mask.cpu().argmax(dim=1).tolist()
        layouts = [_layout(row, begin, config) for row, begin in zip(ids.cpu(), padding, strict=True)]
        positions = torch.stack([positions for positions, _ in layouts])
    prefix = torch.tensor([prefix for _, prefix in layouts])
    return positions.to(ids.device), prefix.to(ids.device)


def _layout(row: torch.Tensor, padding: int, config: ChatGLMConfig) -> tuple[torch.Tensor, int]:
    """Return (positions (2, L), number of tokens before `<sop>`). row: (L,) ids."""
    ids = row.tolist()
    prefix = ids.index(config.bos_token_id) if config.bos_token_id in ids else len(ids)
    marks = [mark for mark in (config.gmask_token_id, config.mask_token_id) if mark in ids]
    place = ids.index(marks[0]) if marks else max(prefix - 1, padding)
    positions = torch.zeros(2, len(ids), dtype=torch.long)
    positions[0] = (torch.arange(len(ids)) - padding).clamp(min=0)
    positions[0, prefix:] = place - padding
    positions[1, prefix:] = torch.arange(1, len(ids) - prefix + 1)
    return positions, prefix


def _before(prefix: torch.Tensor) -> Any:
    """Return a mask function for transformers: whether a column belongs to the prefix of its row."""
    return lambda batch, head, row, column: column < prefix[batch]


def _rotation(places: torch.Tensor, config: ChatGLMConfig, dtype: torch.dtype) -> Rotation:
    """Return cosine and sine, (B, 1, L, width / 2), for one of the two positions. places: (B, L)."""
    width = config.hidden_size // config.num_attention_heads // 2
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=places.device) / width)
    angles = (places[..., None].float() * frequencies.half().float()).repeat(1, 1, 2)[:, None]  # as it was trained
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: torch.Tensor, rotations: Sequence[Rotation]) -> torch.Tensor:
    """Rotate the first half of x by the first position and its second half by the second. x: (B, heads, L, width)."""
    out = []
    for half, (cos, sin) in zip(x.chunk(2, dim=-1), rotations, strict=True):
        one, other = half.chunk(2, dim=-1)
        out.append(half * cos + torch.cat([-other, one], dim=-1) * sin)
    return torch.cat(out, dim=-1)
