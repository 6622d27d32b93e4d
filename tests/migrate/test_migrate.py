"""Every command line of the four older projects' READMEs is read again, each flag with one verdict; what comes out runs."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHARED
from tests.migrate.manual_commands import WANTED, lines_of
from tongwen.cli.parser import make_parser
from tongwen.core.errors import TongwenError
from tongwen.hub.names import current_id
from tongwen.migrate.build_recipe import as_yaml
from tongwen.migrate.flag_values import READERS
from tongwen.migrate.migrate import MigrationResult, migrate_command, migrate_files
from tongwen.migrate.shell import ScriptLine, read_script, split_environment
from tongwen.migrate.tables import Text, known_files, programs
from tongwen.recipe.docs import sections
from tongwen.recipe.load import read

# README -> (its file among the real data, command lines in its code blocks)
READMES = {
    "belle": ("000_6ab032cd2b36fbc2.txt", 10),
    "guanaco": ("002_913cd9eb0318f338.txt", 8),
    "ner": ("003_8ef3b468e611bb48.txt", 1),
    "cla": ("004_2a5aaade4607470b.txt", 38),
}
TABLES = ("trainer", "launchers", "belle", "guanaco", "cla", "llamafactory")
COMMAND = re.compile(r"^(?:[>$] )?(?:[A-Z_]+=\S* )?(?:conda|python|deepspeed|torchrun|accelerate|wget|pip)\s+\S")


ALL = [(name, line) for name in (*READMES, "mentioned") for line in lines_of(name)]


def migrated(line: ScriptLine) -> MigrationResult:
    return migrate_command(line.arguments, current_id)


@pytest.mark.skipif(not SHARED.is_dir(), reason="TONGWEN_SHARED names no folder with the READMEs")
@pytest.mark.parametrize("name", READMES)
def test_command_lines_match_the_readme(name: str) -> None:
    text = (SHARED / "seeds" / READMES[name][0]).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        kept: list[str] = []
        goes_on = False
        for raw in block.splitlines():
            line = raw.strip()
            if goes_on or COMMAND.match(line) or re.match(r"[a-z_]+=\S", line) or (kept and line.startswith("--")):
                kept.append(line)
                goes_on = line.endswith("\\")
        if any(COMMAND.match(line) for line in kept):
            found += read_script("\n".join(kept), name)
    assert [line.arguments for line in found] == [line.arguments for line in lines_of(name)]


def test_number_of_command_lines() -> None:
    assert {name: len(lines_of(name)) for name in READMES} == {name: count for name, (_, count) in READMES.items()}
    assert sum(count for _, count in READMES.values()) == 57


@pytest.mark.parametrize(("name", "line"), ALL, ids=[f"{name}:{line.number}" for name, line in ALL])
def test_each_flag_has_one_verdict_and_the_recipe_loads(
    name: str, line: ScriptLine, tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = migrated(line)
    environment, argv = split_environment(line.arguments)
    verdicts = Counter(verdict.flag for verdict in one.verdicts)
    options = [word for word in argv if re.match(r"--?[A-Za-z]", word) and word != "-m"]
    named = [re.sub(r"=.*", "", word).lstrip("-").replace("-", "_") for word in options]
    for flag, option in zip([*environment, *named], [*environment, *options], strict=True):
        assert sum(verdicts[word] for word in {flag, option}) == 1, f"{flag}: {verdicts}"
    for verdict in one.verdicts:
        assert verdict.verdict in ("kept", "renamed", "mended", "dropped")
        assert verdict.why or verdict.becomes, verdict
        assert verdict.why or verdict.verdict in ("kept", "renamed"), verdict
    for command in one.commands:
        make_parser().parse_args(command)
    assert one.recipe or one.commands or one.instead or one.launch or one.notes
    if one.recipe:
        file = tmp_path / "recipe.yaml"
        assert tongwen("migrate", "--out", file, "--", *line.arguments)[0] == 0
        code, _, err = tongwen("check", file)
        assert code == (3 if "prepare" in one.recipe else 0), err
        assert all("there is no such file" in part for part in re.split(r"\n(?!  →)", err.strip()) if part), err


def test_deepspeed_file_becomes_an_engine_with_several_devices() -> None:
    full, lora = (migrated(lines_of("belle")[place]).recipe["sft"] for place in (4, 6))
    assert full["engine"] == "zero2" and full["schedule"] == "warmup_lr"
    assert "engine" not in lora and lora["schedule"] == "linear"


def test_crawl_scripts_become_synthesize(tongwen: Any) -> None:
    code, out, _ = tongwen("migrate", "--json", "--", "python", "scripts/crawl_prompt.py", "out.txt")
    assert code == 0
    recipe = json.loads(out)["migrated"][0]["recipe"]
    assert recipe["out"] == "out" and recipe["synthesize"]["method"] == "topics" and recipe["synthesize"]["rows"] == 20
    line = [
        "python",
        "generate_instruction.py",
        "generate_instruction_following_data",
        "--num_instructions_to_generate=9",
    ]
    recipe = json.loads(tongwen("migrate", "--json", "--", *line)[1])["migrated"][0]["recipe"]
    assert recipe["synthesize"]["rows"] == 9 and recipe["synthesize"]["seeds"] == "./zh_seed_tasks.json"


def settings_of(name: str) -> tuple[Any, ...]:
    readme, place = name.split(":")
    recipe = migrated(lines_of(readme)[int(place) - 1]).recipe
    section = "sft" if "sft" in recipe else "pretrain"
    settings = recipe[section]
    adapter = settings.get("adapter", {})
    return (
        section,
        settings["batch_size"],
        settings["learning_rate"],
        adapter.get("rank"),
        adapter.get("targets"),
        settings["max_length"],
        settings.get("template"),
        settings["stop_after"],
    )


@pytest.mark.parametrize("name", WANTED)
def test_recipe_matches_the_readme_settings(name: str) -> None:
    assert settings_of(name) == WANTED[name]


def test_expected_settings_cover_every_training_command() -> None:
    trained = {
        f"{name}:{place}" for name in READMES for place, line in enumerate(lines_of(name), 1) if migrated(line).recipe
    }
    assert trained == set(WANTED)


def test_rule_tables_name_existing_readers_and_settings() -> None:
    known = {f"{name}.{key}".lstrip(".") for name, section in sections() for key in section.model_fields}
    count = 0
    for table in TABLES:
        for program in programs(table).values():
            for flag, rule in [*program.flags.items(), *program.prefixes.items()]:
                assert rule.read in READERS, (program.id, flag)
                assert (
                    rule.to or rule.dropped or rule.sets or rule.read in ("file", "several", "hosts", "whole_batch")
                ), (
                    program.id,
                    flag,
                )
                for word in [rule.to, *rule.sets, *(() if program.command else program.always)]:
                    names = [word.replace("@", section) for section in ("sft", "pretrain")]
                    assert not re.match(r"[a-z@]+\.", word) or known & set(names), (program.id, flag, word)
                for text in (rule.mended, rule.dropped, *rule.unless.values(), *rule.needs.values()):
                    assert text is None or (isinstance(text, Text) and text), (program.id, flag)
                count += 1
    assert count > 200


# -- what cannot be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["python", "finetune.py", "--lora_rnk", "8", "--base_model", "x"], ["lora_rnk", "lora_r"]),
        (["torchrun", "--nproc_per_nod=2", "finetune.py", "--use_lora"], ["nproc_per_nod", "nproc_per_node"]),
        (["python", "finetun.py"], ["no known script", "finetune.py"]),
        (["python", "finetune.py", "--base_model", "x", "--learning_rate", "--bits", "4"], ["learning_rate", "no value"]),
        (["python", "finetune.py", "--base_model", "x", "--learning_rate", "fast"], ["'fast' is not a valid number"]),
        (["python", "finetune.py", "--base_model", "x", "--bits", "3"], ["'3' is not one of: 4, 8"]),
        (["python", "finetune.py", "--base_model=x", "--bits=4", "--bits=8"], ["bits is given twice", "'4'", "'8'"]),
        (["python", "merge_llama_with_chinese_lora.py", "--base_model", "b", "--lora_model", "a,", "c"], ["'c' follows no flag"]),
        (["python", "finetune.py", "--use_lora", "--model_config_file", "gone.json"], ["gone.json", "no such file"]),
        (["FOO=1"], ["no command"]),
    ],
)  # fmt: skip
def test_unknown_flag_is_refused_with_the_nearest(argv: list[str], parts: list[str], tongwen: Any) -> None:
    code, _, err = tongwen("migrate", "--", *argv)
    assert code == 2
    for part in parts:
        assert part in err


def write(folder: Path, name: str, value: Any) -> Path:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder / name


CONFIG = {"model_type": "bloom", "model_name_or_path": "m", "data_path": "d.json", "output_dir": "o", "num_epochs": 1}
CONFIG |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 1e-5, "cutoff_len": 64}


def test_related_files_make_one_recipe(tongwen: Any, tmp_path: Path) -> None:
    files = [
        write(tmp_path, "run.json", CONFIG),
        write(tmp_path, "lora.json", {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0, "lora_target_modules": ["a", "b"]}),
        write(tmp_path, "ds.json", {"train_batch_size": 8, "zero_optimization": {"stage": 2}}),
    ]  # fmt: skip
    code, out, _ = tongwen("migrate", *files, "--json")
    assert code == 0
    recipe = json.loads(out)["migrated"][0]["recipe"]
    assert recipe["sft"]["batch_size"] == 8 and "engine" not in recipe["sft"]  # one device
    assert recipe["sft"]["adapter"] == {"rank": 4, "alpha": 8, "dropout": 0, "targets": ["a", "b"]}


def test_contradictory_files_are_refused(tongwen: Any, tmp_path: Path) -> None:
    run = write(tmp_path, "run.json", CONFIG)
    ds = write(tmp_path, "ds.json", {"train_batch_size": 64, "zero_optimization": {"stage": 2}})
    code, _, err = tongwen("migrate", run, ds)
    assert code == 2 and "train_batch_size is 64" in err and "multiply to 8" in err
    code, _, err = tongwen("migrate", write(tmp_path, "strange.json", {"hidden_size": 1}))
    assert code == 2 and "not a configuration file of an older project" in err and "hidden_size" in err


def test_conflicting_values_are_refused_with_both(tongwen: Any, tmp_path: Path) -> None:
    one = write(tmp_path, "one.json", CONFIG)
    other = write(tmp_path, "other.json", CONFIG | {"learning_rate": 2e-5, "cutoff_len": 512})
    code, _, err = tongwen("migrate", one, other)
    assert code == 2
    for part in (
        "contradict each other",
        "sft.learning_rate",
        "1e-05",
        "2e-05",
        "sft.max_length",
        "64 and 512",
        "keep one",
    ):
        assert part in err, err
    code, _, err = tongwen("migrate", write(tmp_path, "odd.json", CONFIG | {"learning_rat": 1, "lora_rank": 8}))
    assert code == 2 and "'learning_rat'" in err and "learning_rate" in err and "'lora_rank'" in err


def test_partial_configuration_is_refused(tongwen: Any, tmp_path: Path) -> None:
    lora = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0, "lora_target_modules": ["a"]}
    code, _, err = tongwen("migrate", write(tmp_path, "lora.json", lora))
    assert code == 2 and "this names no model" in err and "a part" in err
    code, _, err = tongwen("migrate", "--", "python", "run_clm_sft_with_peft.py", "--model_name_or_path", "m")
    assert code == 2 and "prepare" in err and "recipe.yaml" in err


def test_shell_script_variables_are_expanded(tongwen: Any, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(
        '# note\nlr=1e-4\nout="o p"\npython finetune.py --base_model m \\\n  --learning_rate ${lr}\n  --output_path $out\n'
    )
    for argv in (["migrate", script, "--json"], ["migrate", "--json", "--", "bash", script]):
        code, out, _ = tongwen(*argv)
        recipe = json.loads(out)["migrated"][0]["recipe"]
        assert code == 0 and recipe["sft"]["learning_rate"] == 1e-4 and recipe["out"] == "o p"
    script.write_text("python finetune.py --base_model 'm\n")
    code, _, err = tongwen("migrate", script)
    assert code == 2 and "run.sh:1" in err and "quote" in err
    assert tongwen("migrate", tmp_path / "gone.sh")[0] == 2
    assert tongwen("migrate")[0] == 2
    assert tongwen("migrate", tmp_path)[0] == 4


def test_later_command_uses_earlier_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of the adapter is known when the line before has run, and not when the script is read."""
    from tongwen.commands import migrate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    script = tmp_path / "all.sh"
    script.write_text(
        "CUDA_VISIBLE_DEVICES=0 python finetune.py --base_model m --output_dir output/\npython merge_lora.py\n"
    )
    commands = migrate.run([str(script)], "", None, to_run=True)
    assert next(commands) == (["run", "output.yaml"], False) and os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    (tmp_path / "output" / "sft").mkdir(parents=True)
    write(tmp_path / "output" / "sft", "manifest.json", {})
    write(tmp_path / "output" / "sft", "adapter_config.json", {"base_model_name_or_path": "m"})
    merge = ["merge", "--base", "m", "--adapter", "output/sft", "--out", "models/m-finetune"]
    assert list(commands) == [(merge, True)]


def test_output_gets_its_own_folder() -> None:
    line = ["python", "merge_llama_with_chinese_lora.py", "--base_model", "b", "--lora_model", "l"]
    for more in ([], ["--output_dir", "./"]):
        (command,) = migrate_command([*line, *more], current_id).commands
        assert command[command.index("--out") + 1] == "merged"


def test_multi_node_command_keeps_torchrun(tongwen: Any) -> None:
    line = [
        "torchrun",
        "--nnodes",
        "2",
        "--node_rank",
        "0",
        "--nproc_per_node",
        "4",
        "finetune.py",
        "--base_model",
        "x",
    ]
    code, out, _ = tongwen("migrate", "--", *line)
    assert code == 0 and "torchrun --nnodes 2 --node_rank 0 --nproc_per_node 4 -m tongwen run RECIPE" in out
    assert "batch_size: 128" in out  # 1 x 16 x 4 x 2
    code, _, err = tongwen("migrate", "--run", "--", *line)
    assert code == 2 and "with torchrun on each of them" in err


HOSTS = "worker-0 slots=8\nworker-1 slots=8  # the second\n"


@pytest.mark.parametrize(
    ("launcher", "printed", "devices"),
    [
        (
            "deepspeed --hostfile hosts --num_nodes 2 --num_gpus 8",
            "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint worker-0:29500 -m tongwen run",
            8,
        ),
        (
            "deepspeed --hostfile hosts",
            "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint worker-0:29500 -m tongwen run",
            None,
        ),
        (
            "deepspeed --hostfile none --num_nodes 2 --num_gpus 4",
            "torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint FIRST_HOST:29500 -m tongwen run",
            4,
        ),
        (
            "deepspeed --include a:0,1@b:0,1 --master_port 29501",
            "CUDA_VISIBLE_DEVICES=0,1 torchrun --nnodes 2 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint a:29501 -m tongwen run",
            2,
        ),
        ("deepspeed --include localhost:0,1,2,3 --master_port 29501", "CUDA_VISIBLE_DEVICES=0,1,2,3 tongwen run", 4),
        ("accelerate launch --gpu_ids 0,2 --num_processes 2", "CUDA_VISIBLE_DEVICES=0,2 tongwen run", 2),
        (
            "accelerate launch --num_processes 8 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29502",
            "torchrun --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29502 --nproc_per_node 4 -m tongwen run",
            4,
        ),
        ("torchrun --nproc_per_node 4 --master_port 29501", "tongwen run", 4),
    ],
)
def test_launchers_become_lines_that_torchrun_knows(
    tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, printed: str, devices: int | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text(HOSTS, encoding="utf-8")
    code, out, _ = tongwen("migrate", "--", *launcher.split(), "finetune.py", "--base_model", "x")
    assert code == 0 and f"  {printed} RECIPE" in out
    assert ("on each machine" in out) == ("torchrun" in printed)
    assert (f"devices: {devices}\n" in out) if devices else "devices:" not in out
    if "torchrun " in printed:
        known = torchrun_options()
        line = next(line for line in out.splitlines() if f"{printed} RECIPE" in line)
        assert {word for word in line.split() if word.startswith("--")} <= known


def torchrun_options() -> set[str]:
    from torch.distributed.run import get_args_parser

    return {option for action in get_args_parser()._actions for option in action.option_strings}


def test_accelerate_config_file_keeps_devices_and_engine(
    tongwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("fsdp.yaml")
    text = "compute_environment: LOCAL_MACHINE\ndistributed_type: {}\nnum_processes: 4\nnum_machines: 1\nmixed_precision: bf16\n"
    file.write_text(text.format("FSDP") + "fsdp_config: {fsdp_version: 2}\n", encoding="utf-8")
    line = ["accelerate", "launch", "--config_file", "fsdp.yaml", "finetune.py", "--base_model", "x"]
    code, out, _ = tongwen("migrate", "--", *line)
    assert code == 0 and "devices: 4\n" in out and "engine: fsdp.yaml\n" in out and "on each machine" not in out
    file.write_text(text.format("MULTI_GPU"), encoding="utf-8")
    code, out, _ = tongwen("migrate", "--", *line)
    assert code == 0 and "devices: 4\n" in out and "engine:" not in out
    file.write_text("compute_environment: LOCAL_MACHINE\nnum_processes: 4\n", encoding="utf-8")
    code, out, _ = tongwen("migrate", "--", *line)
    assert code == 0 and "devices: 4\n" in out and "engine:" not in out
    file.unlink()
    code, _, err = tongwen("migrate", "--", *line)
    assert code == 2 and "there is no such file" in err


@pytest.mark.parametrize("value", ["@", "a@", "localhost:", "0,1@a", ""])
def test_odd_lists_of_gpus_end_without_a_traceback(tongwen: Any, value: str) -> None:
    code, _, _err = tongwen("migrate", "--", "deepspeed", "--include", value, "finetune.py", "--base_model", "x")
    assert code in (0, 2)


def test_processes_that_cannot_be_divided_are_refused(tongwen: Any) -> None:
    line = ["accelerate", "launch", "--num_processes", "3", "--num_machines", "2", "finetune.py", "--base_model", "x"]
    code, _, err = tongwen("migrate", "--", *line)
    assert code == 2 and "3 processes cannot be divided among 2 machines" in err


def test_llamafactory_yaml_is_migrated(tongwen: Any, tmp_path: Path) -> None:
    file = tmp_path / "qwen.yaml"
    file.write_text(
        "model_name_or_path: Qwen/Qwen3-4B\ntrust_remote_code: true\nstage: sft\ndo_train: true\nfinetuning_type: lora\n"
        "lora_rank: 8\nlora_target: all\nquantization_bit: 4\ndataset: identity,alpaca_zh_demo\ntemplate: qwen3_nothink\n"
        "cutoff_len: 2048\noverwrite_cache: true\noutput_dir: saves/qwen3\nlogging_steps: 10\nplot_loss: true\n"
        "per_device_train_batch_size: 1\ngradient_accumulation_steps: 8\nlearning_rate: 1.0e-4\nnum_train_epochs: 3.0\n"
        "lr_scheduler_type: cosine\nwarmup_ratio: 0.1\nbf16: true\nddp_timeout: 180000000\nadam_beta2: 0.98\n",
        encoding="utf-8",
    )
    code, out, _ = tongwen("migrate", file, "--json")
    assert code == 0
    recipe = json.loads(out)["migrated"][0]["recipe"]
    assert recipe["prepare"]["dialogues"][1] == {"path": "data/dataset_info.json", "entry": "alpaca_zh_demo"}
    assert recipe["sft"]["adapter"] == {"method": "qlora", "rank": 8, "targets": "all-linear", "quantize": "nf4"}
    assert (recipe["sft"]["batch_size"], recipe["sft"]["stop_after"], recipe["sft"]["template"]) == (
        8,
        "3 epochs",
        "own",
    )
    assert recipe["sft"]["trainer"] == {"adam_beta2": 0.98}
    file.write_text("model_name_or_path: a\nadapter_name_or_path: b\nexport_dir: c\n", encoding="utf-8")
    assert json.loads(tongwen("migrate", file, "--json")[1])["migrated"][0]["commands"] == [
        ["tongwen", "merge", "--base", "a", "--adapter", "b", "--out", "c"]
    ]
    file.write_text("model_name_or_path: a\nstage: ppo\n", encoding="utf-8")
    code, _, err = tongwen("migrate", file)
    assert code == 2 and "'ppo' is not one of: sft, pt, dpo, kto" in err


@pytest.mark.parametrize(
    ("keys", "prefer"),
    [
        ("stage: dpo\npref_loss: sigmoid\npref_beta: 0.2\npref_ftx: 0.0\n", {"method": "dpo", "beta": 0.2}),
        ("stage: dpo\npref_loss: simpo\nsimpo_gamma: 0.5\n", {"method": "simpo", "gamma": 0.5}),
        ("stage: kto\npref_beta: 0.1\n", {"method": "kto", "beta": 0.1}),
    ],
)
def test_llamafactory_preference_stages_become_prefer(
    tongwen: Any, tmp_path: Path, keys: str, prefer: dict[str, Any]
) -> None:
    file = tmp_path / "dpo.yaml"
    file.write_text(
        f"model_name_or_path: a\n{keys}finetuning_type: lora\nlora_rank: 4\ndataset: dpo_zh\ntemplate: qwen3\n"
        "cutoff_len: 512\nlearning_rate: 5.0e-6\nnum_train_epochs: 2\noutput_dir: o\n",
        encoding="utf-8",
    )
    code, out, err = tongwen("migrate", file, "--json")
    assert code == 0, err
    made = json.loads(out)["migrated"][0]
    assert prefer.items() <= made["recipe"]["prefer"].items() and "sft" not in made["recipe"]
    assert made["recipe"]["prefer"]["template"] == "own" and made["recipe"]["prefer"]["adapter"]["rank"] == 4
    assert made["recipe"]["prepare"] == {"preferences": [{"path": "data/dataset_info.json", "entry": "dpo_zh"}]}
    assert read(made["text"], "dpo.yaml")[0].prefer


def test_command_that_names_a_yaml_is_migrated_as_the_file(tongwen: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "model_name_or_path: a\nstage: sft\nfinetuning_type: lora\ndataset: mine\nlearning_rate: 2.0e-4\noutput_dir: o\n",
        encoding="utf-8",
    )
    texts = {tongwen("migrate", file, "--json")[1].partition('"text"')[2]}
    for program in ("llamafactory-cli", "lmf"):
        texts.add(tongwen("migrate", "--json", "--", program, "train", file)[1].partition('"text"')[2])
    assert len(texts) == 1
    changed = tongwen("migrate", "--", "llamafactory-cli", "train", file, "learning_rate=1e-5", "cutoff_len=99")[1]
    assert "learning_rate: 1.0e-05" in changed and "max_length: 99" in changed
    code, _, err = tongwen("migrate", "--", "llamafactory-cli", "train", file, "learning_rate")
    assert code == 2 and "'learning_rate' behind the file is no key=value" in err
    code, _, err = tongwen("migrate", "--", "llamafactory-cli", "train", tmp_path / "none.yaml")
    assert code == 2 and "there is no such file" in err
    file.write_text("model_name_or_path: a\nadapter_name_or_path: b\ntemplate: qwen3\n", encoding="utf-8")
    for word, command in (("chat", ["chat", "a"]), ("webchat", ["chat", "a"]), ("api", ["serve", "a"])):
        made = json.loads(tongwen("migrate", "--json", "--", "llamafactory-cli", word, file)[1])["migrated"][0]
        assert made["commands"][0][1:3] == command and ("--web" in made["commands"][0]) == (word == "webchat")


@pytest.mark.parametrize(
    ("fp16", "bf16", "precision"), [("False", "True", "auto"), ("True", "False", "auto"), ("False", "False", "fp32")]
)
def test_two_flags_of_precision_belong_together(tongwen: Any, fp16: str, bf16: str, precision: str) -> None:
    code, out, _ = tongwen(
        "migrate", "--", "python", "finetune.py", "--base_model=a", f"--fp16={fp16}", f"--bf16={bf16}"
    )
    assert code == 0 and f"precision: {precision}\n" in out


ODD = [
    None,
    True,
    0,
    -1,
    1e400,
    "",
    [],
    {},
    [1, None],
    {"a": {"b": None}},
    "inf",
    "nan",
    "1e9",
    3.7,
    "[a|b]",
    "auto",
    "  ",
]


def test_random_damage_gives_a_result_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    ended = Counter[bool]()
    for _ in range(150):
        name = chance.choice([*known_files()])
        data = json.loads(json.dumps(known_files()[name]))
        argv = list(chance.choice(ALL)[1].arguments)
        for _ in range(chance.randint(1, 3)):
            data[chance.choice([*data])] = chance.choice(ODD)
            argv[chance.randrange(len(argv))] = str(chance.choice(ODD))
        file = write(tmp_path, name, data)
        for attempt in (lambda: migrate_files([str(file)], current_id), lambda: migrate_command(argv, current_id)):
            try:
                one = attempt()
                if one.recipe:
                    read(as_yaml(one.recipe, one.old), "recipe.yaml")
                ended[True] += 1
            except TongwenError:
                ended[False] += 1
    assert ended[True] > 20 and ended[False] > 20
