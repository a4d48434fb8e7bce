"""Learning masks from the command line: packed rows, passkeys, the three scripts, the shell wrappers, the demo."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import learn_masks
import learning
import packed
import pytest
import torch
from packed import IGNORED
from transformers import AutoModelForCausalLM

from autotune.learn import learn
from modify_model import patch
from modify_model.cli import tiny
from modify_model.cli.language import DEMO, load_model, read_texts
from modify_model.mask_trainer import MASKS
from spas_attn.published import streaming_heads

ROOT = Path(__file__).parents[2]
QUICK = ["--max_steps", "2", "--max_tokens_per_device", "512", "--window", "128", "--use_cpu", "--disable_tqdm", "true"]


# -- data -------------------------------------------------------------------------------------------------------------


def test_rows_hold_the_documents_in_order_without_padding() -> None:
    documents = [list(range(100, 107)), list(range(200, 203)), [300], list(range(400, 412))]
    rows = packed.pack(((ids, list(ids)) for ids in documents), 8)
    assert [token for row in rows for token in row["input_ids"]] == [token for ids in documents for token in ids][:16]
    assert [len(row["input_ids"]) for row in rows] == [8, 8], "the rest is dropped"
    assert rows[0]["position_ids"] == [*range(7), 0] and rows[1]["position_ids"] == [0, 1, 0, 0, 1, 2, 3, 4]
    assert rows[0]["labels"] == [IGNORED, *range(101, 107), IGNORED]
    assert rows[1]["labels"] == [IGNORED, 202, IGNORED, IGNORED, 401, 402, 403, 404]
    assert packed.pack(((ids, list(ids)) for ids in documents), 8, rows=1) == rows[:1]
    batch = packed.collate(rows)
    assert batch["input_ids"].shape == (1, 16) and batch["cu_seq_lens_q"].tolist() == [0, 7, 8, 10, 11, 16]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["max_length_q"] == 7
    assert "cu_seq_lens_q" not in packed.collate(packed.pack([(documents[3], documents[3])], 12))


def test_the_loss_of_a_packed_row_is_that_of_its_documents() -> None:
    """No document sees another, in neither branch of the gates."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in (300, 84, 640)]
    plain, total, count = tiny.llama(), 0.0, 0
    with torch.no_grad():
        for ids in documents:
            row = torch.tensor([ids])
            total += float(plain(row, labels=row).loss) * (len(ids) - 1)
            count += len(ids) - 1
        model = patch(plain)
        with learn(model, sink_size=64, window=2048):
            loss = model(**packed.collate(packed.pack([(x, x) for x in documents], 1024)), use_cache=False).loss
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


def test_rows_reject_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="together have 3 tokens, fewer than one row of 8"):
        packed.pack([([1, 2, 3], [1, 2, 3])], 8)
    with pytest.raises(ValueError, match="no row has a label"):
        packed.pack([([1, 2, 3], [IGNORED] * 3)], 3)
    with pytest.raises(ValueError, match="at least 2"):
        packed.pack([], 1)


def test_of_chats_the_assistants_words_are_labels() -> None:
    tokenizer = tiny.tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        packed.tokens_of(tokenizer, {"messages": []})
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    said = [("user", "Hi"), ("assistant", "Hello"), ("user", "How?"), ("assistant", "Well")]
    ids, labels = packed.tokens_of(tokenizer, {"messages": [dict(role=r, content=c) for r, c in said]})
    assert tokenizer.decode(ids).startswith("<user>Hi|<assistant>Hello|<user>How?|<assistant>Well|")
    assert tokenizer.decode([x for x in labels if x != IGNORED], skip_special_tokens=True) == "Hello|Well|"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="changes what stands before message 2"):
        packed.tokens_of(tokenizer, {"messages": [dict(role=r, content=c) for r, c in said]})


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.py").write_text("two")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"messages": []}\n')
    assert list(packed.read_records(str(tmp_path))) == [{"text": "one"}, {"text": "two"}]
    assert list(packed.read_records(str(tmp_path / "c.jsonl"))) == [{"text": "three"}, {"messages": []}]
    assert next(iter(packed.read_records(None)))["text"]
    (tmp_path / "d.jsonl").write_text("{")
    with pytest.raises(ValueError, match="cannot read the documents"):
        list(packed.read_records(str(tmp_path / "d.jsonl")))
    with pytest.raises(ValueError, match='must have "text", "content" or "messages"'):
        packed.tokens_of(tiny.tokenizer(), {"words": "x"})
    asked: list[Any] = []
    module = type("datasets", (), {})
    module.load_dataset = staticmethod(lambda *names, **more: asked.append((names, more)) or iter([{"content": "x"}]))
    module.load_from_disk = staticmethod(lambda name: {"train": [{"text": name}], "test": []})
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert list(packed.read_records("owner/name:small")) == [{"content": "x"}]
    assert asked == [(("owner/name", "small"), {"split": "train", "streaming": True})]
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert list(packed.read_records(str(tmp_path))) == [{"text": str(tmp_path)}]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        list(packed.read_records("owner/name"))


def test_passkeys() -> None:
    tokenizer = tiny.tokenizer()
    text = [tokenizer("The grass is green. " * 300, add_special_tokens=False)["input_ids"]]
    data = packed.PasskeyData(tokenizer, text, packed.Passkeys(3, 4, 600, 1000), 60, seed=1)
    lengths = [len(data[index]["input_ids"]) for index in range(len(data))]
    assert len(data) == 60 and lengths[0] == lengths[50] == 600 and lengths[49] == 1000
    assert lengths[:50] == sorted(lengths[:50]) and len(set(lengths)) == 50
    assert data[7] == data[7] != data[57]
    row = data[49]
    whole = tokenizer.decode(row["input_ids"])
    context, questions = whole[: whole.index("\nQuestion")], whole[whole.index("\nQuestion") :]
    secrets = dict(re.findall(r"Passkey (\d) is: ([a-z ]+)\.", context))
    asked = dict(re.findall(r"passkey (\d)\? Answer: ([a-z ]+)\.", questions))
    assert secrets == asked and list(secrets) == ["1", "2", "3"]
    assert all(len(secret.split()) == 4 and set(secret.split()) <= set(packed.WORDS) for secret in secrets.values())
    labels = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(labels) == "".join(f" {secret}." for secret in secrets.values())
    assert row["position_ids"] == list(range(1000))
    with pytest.raises(ValueError, match="use longer contexts, or fewer or shorter passkeys"):
        packed.PasskeyData(tokenizer, text, packed.Passkeys(10, 32, 600, 1000), 1)
    with pytest.raises(ValueError, match="fewer than a context"):
        packed.PasskeyData(tokenizer, text, packed.Passkeys(1, 1, 600, 100_000), 1)


# -- scripts ----------------------------------------------------------------------------------------------------------


def run(script: str, folder: Path, *more: str) -> int:
    """Run one of the scripts in this process, on the tiny LLaMA."""
    module = __import__(script)
    arguments = ["--model_name", "tiny:Llama", "--output_dir", str(folder), *QUICK, *more]
    return learning.main(module.__doc__, module.DEFAULTS, arguments)


def test_the_three_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks, then masks and weights from these, then the weights under them."""
    more = ["--save_steps", "1", "--start_head_sparsity", "0.5", "--end_head_sparsity", "0.5"]
    assert run("learn_masks", tmp_path / "a", *more) == 0
    out = capsys.readouterr().out
    for text in ("trains masks: masks of 4 KV heads in 2 layers learned", "weights frozen", "sink 128, window 128"):
        assert text in out
    assert "gates at sparsity" in out and list(tmp_path.rglob("a/runs/*/events.out.tfevents.*"))
    assert not (tmp_path / "a" / "model.safetensors").exists(), "the weights are what they were"
    table = tmp_path / "a" / MASKS / "masks_sp0.5.tsv"
    assert len(streaming_heads(table, query_heads=2)) == 2
    # The same once more, from its last checkpoint.
    before = (tmp_path / "a" / MASKS / "full_attention_heads.tsv").read_text()
    assert run("learn_masks", tmp_path / "a", *more, "--resume_from_checkpoint", "last", "--max_steps", "2") == 0
    assert (tmp_path / "a" / MASKS / "full_attention_heads.tsv").read_text() == before

    given = ["--load_masks_from", str(table), "--save_strategy", "no", "--report_to", "none", "--learning_rate", "1e-3"]
    for number, script in enumerate(("learn_masks_and_weights", "finetune_with_masks")):
        folder = tmp_path / f"{number}"
        assert run(script, folder, *given, "--warmup_steps", "0") == 0
        out = capsys.readouterr().out
        assert ("masks and weights", "weights with fixed masks")[number] in out and "weights trained" in out
        weights = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
        assert not torch.equal(weights, tiny.llama().lm_head.weight) and (folder / "tokenizer_config.json").exists()
        assert (folder / MASKS / "full_attention_heads.tsv").exists()
    assert (tmp_path / "1" / MASKS / "full_attention_heads.tsv").read_text() == table.read_text()


def test_distillation_on_passkeys(tmp_path: Path) -> None:
    sizes = [
        "--num_passkeys",
        "2",
        "--passkey_words",
        "3",
        "--context_length_min",
        "500",
        "--context_length_max",
        "520",
    ]
    options = ["--objective", "distill", "--passkeys", *sizes, "--report_to", "none", "--save_strategy", "no"]
    assert run("learn_masks", tmp_path, *options) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "no/such/place"], "pip install datasets"),
        (["--model_name", "no/such/model"], "no folder and no model on the hub"),
        (["--resume_from_checkpoint", "last"], "there is no checkpoint in"),
        (["--freeze_mask_parameters"], "leave nothing to train"),
        (["--passkeys"], "use longer contexts"),
    ],
)
def test_wrong_arguments(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tmp_path.joinpath("out").mkdir()
    assert run("learn_masks", tmp_path / "out", "--report_to", "none", *options) == 2
    assert message in capsys.readouterr().err


def wrapper(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a shell wrapper."""
    command = ["bash", str(ROOT / "evaluate" / name), *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "NPROC": "1"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


COMMON = dict(
    window=1024, sink_size=128, adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0, bf16=True,
    gradient_checkpointing=True, sparsity_warmup_ratio=0.8, warmup_type="linear",
    lr_scheduler_type="cosine_with_min_lr", disable_linear_regularization_term=False, toggle_type="streaming",
    objective="lm",
)  # fmt: skip
# As the originals' scripts have them (masks only: PruLong's).
WRAPPERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "prulong_masksonly.sh": ("learn_masks.py", "masks", dict(
        max_steps=1000, gradient_accumulation_steps=16, learning_rate=1e-5, warmup_steps=0.1, min_lr_ratio=0.01,
        start_head_sparsity=0.0, end_head_sparsity=0.7, mask_learning_rate=1.0, reg_learning_rate=1.0)),
    "prulong_masksandweights.sh": ("learn_masks_and_weights.py", "masks and weights", dict(
        max_steps=1000, gradient_accumulation_steps=16, learning_rate=1e-5, warmup_steps=0.1, min_lr_ratio=0.1,
        start_head_sparsity=0.7, end_head_sparsity=0.7, load_masks_from="a model/masks_sp0.7.tsv")),
    "sft.sh": ("finetune_with_masks.py", "weights with fixed masks", dict(
        max_steps=250, gradient_accumulation_steps=64, learning_rate=2e-5, warmup_steps=0.05, min_lr_ratio=0.1,
        load_masks_from="a model/masks_sp0.7.tsv")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_run_what_the_document_says(name: str, tmp_path: Path) -> None:
    script, mode, expected = WRAPPERS[name]
    done = wrapper(name, "--use_cpu", MODEL="a model", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    *said, command = done.stdout.splitlines()
    words = shlex.split(command)
    assert Path(words[1]).name == script and words[-1] == "--use_cpu"
    module = __import__(Path(script).stem)
    run_arguments, args = learning.arguments_of("", module.DEFAULTS, words[2:])
    assert args.mode == mode and run_arguments.model_name == "a model" and run_arguments.max_tokens_per_device == 32768
    for option, value in (COMMON | expected).items():
        assert getattr(args, option) == value, option
    first = {"masks": "trains masks only", "masks and weights": "trains masks and all weights"}
    assert said[0].startswith(first.get(mode, "trains all weights under fixed masks"))
    for text in (
        f"steps {args.max_steps}",
        f"batch {args.gradient_accumulation_steps} rows",
        "sink 128",
        "window 1024",
    ):
        assert text in said[1]


def test_wrappers_take_variables() -> None:
    variables = dict(MODEL="m", DRY_RUN="1", NPROC="4", BATCH="8", WINDOW="256", END="0.5", DATA="texts", OUT="there")
    words = shlex.split(wrapper("prulong_masksonly.sh", **variables).stdout.splitlines()[-1])
    assert "--nproc_per_node=4" in words
    _, args = learning.arguments_of("", learn_masks.DEFAULTS, [*words[words.index("--model_name") :], "--use_cpu"])
    assert args.fsdp is True and args.fsdp_config["version"] == 2 and args.gradient_checkpointing
    pairs = dict(zip(words, words[1:], strict=False))
    for option, value in {
        "gradient_accumulation_steps": "2", "window": "256", "end_head_sparsity": "0.5", "data": "texts",
        "output_dir": "there",
    }.items():  # fmt: skip
        assert pairs[f"--{option}"] == value, option
    assert "set MODEL" in wrapper("sft.sh").stderr
    uneven = wrapper("sft.sh", MODEL="m", NPROC="3")
    assert uneven.returncode == 2 and "do not divide" in uneven.stderr


def test_no_wrapper_holds_a_token_or_a_path_of_its_authors() -> None:
    for file in [*(ROOT / "evaluate").glob("*.sh"), ROOT / "evaluate" / "training" / "wrapper.sh"]:
        assert not re.search(r"(?i)api_key|token=|/(home|data|scratch|mnt)/|wandb", file.read_text("utf-8")), file


@pytest.mark.slow
def test_a_wrapper_trains(tmp_path: Path) -> None:
    variables = dict(MODEL="tiny:Llama", TOKENS="512", STEPS="2", BATCH="2", WINDOW="128", OUT=str(tmp_path))
    done = wrapper("prulong_masksonly.sh", "--use_cpu", "--report_to", "none", "--bf16", "false", **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trains masks: masks of 4 KV heads" in done.stdout and (tmp_path / MASKS / "masks_sp0.7.tsv").exists()


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        learning.main(learn_masks.__doc__, learn_masks.DEFAULTS, ["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in ("context_window_if_toggled", "mask_learning_rate", "enable_layerwise_sparsity", "load_masks_from"):
        assert f"--{option}" in out


@pytest.mark.slow
def test_the_demo_llama_learns_masks_in_half_a_minute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two cores. Passkeys from afar tell heads apart; kept heads find them in text that was not trained on."""
    sizes = [
        "--num_passkeys",
        "4",
        "--passkey_words",
        "3",
        "--context_length_min",
        "512",
        "--context_length_max",
        "1024",
    ]
    rates = ["--max_steps", "40", "--reg_learning_rate", "0.1", "--end_head_sparsity", "0.5", "--window", "128"]
    more = ["--use_cpu", "--passkeys", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
    options = ["--model_name", str(DEMO), "--output_dir", str(tmp_path), *sizes, *rates, *more]
    began = time.process_time()
    assert learning.main(learn_masks.__doc__, learn_masks.DEFAULTS, options) == 0
    assert time.process_time() - began < 120, "a minute on two cores"
    assert "warning" not in capsys.readouterr().out, "the gates separate"

    lines = (tmp_path / MASKS / "full_attention_heads.tsv").read_text().splitlines()
    gates = torch.tensor([[float(cell) for cell in line.split()] for line in lines])
    table = (gates > 0.5).float()
    assert bool(((gates < 0.1) | (gates > 0.9)).all()) and 0.4 < float(1 - table.mean()) < 0.75
    model, tokenizer = load_model(DEMO, device="cpu")
    unseen = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in read_texts(DEMO / "heldout", "unseen")]
    data = packed.PasskeyData(tokenizer, unseen, packed.Passkeys(4, 3, 512, 1024), 50, seed=9)
    rows = [packed.collate([data[index]]) for index in (9, 29, 49)]
    handle = learn(patch(model), window=128)

    @torch.no_grad()
    def nats(heads: torch.Tensor) -> float:
        handle.freeze(heads)
        return sum(float(model(**row, use_cache=False).loss) for row in rows) / len(rows)

    generator = torch.Generator().manual_seed(0)
    shuffled = [table.flatten()[torch.randperm(12, generator=generator)].view_as(table) for _ in range(3)]
    dense, learned, random = nats(torch.ones_like(table)), nats(table), [nats(heads) for heads in shuffled]
    assert learned < dense + 0.1 and learned + 0.3 < sum(random) / 3, (dense, learned, random)
