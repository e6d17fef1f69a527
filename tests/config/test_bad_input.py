"""Everything a user can get wrong ends in exit status 2, one line that helps, and nothing touched."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from inputs import Inputs, write_prompts
from safetensors.numpy import load_file, save_file
from tiny_models import make_llama
from tiny_tokenizer import TEMPLATE, make_tokenizer

from megatron_npd.cli import main
from megatron_npd.config import load_config
from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.files import read_json
from megatron_npd.prepare.provenance import provenance
from megatron_npd.run_directory import RunDirectory

Refuse = Callable[..., str]


@pytest.fixture
def refuse(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that must be refused (`npd prepare` by default), return its line."""

    def run(*argv: str) -> str:
        before = snapshot(inputs.run)
        capsys.readouterr()
        assert main(list(argv) or ["prepare", str(inputs.path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(r"npd: error: [^\n]+\n", captured.err), captured.err
        assert snapshot(inputs.run) == before
        return captured.err

    return run


def snapshot(folder: Path) -> dict[str, bytes] | None:
    """Content of every file of a folder, or None where there is none."""
    if not folder.exists():
        return None
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def drop_tensor(path: Path, name: str) -> None:
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})


def shrink_embedding(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = np.ascontiguousarray(tensors["model.embed_tokens.weight"][:-1])
    save_file(tensors, path, {"format": "pt"})


def spoil_a_number(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"][7] = np.nan
    save_file(tensors, path, {"format": "pt"})


def lose_a_listed_file(folder: Path) -> None:
    make_llama(folder, seed=0, num_hidden_layers=1, split=True)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def edit_end(inputs: Inputs, value: object) -> None:
    """The end tokens of the student's generation config."""
    edit_json(inputs.student / "generation_config.json", eos_token_id=value)


def edit_heads(inputs: Inputs, heads: int, kv_heads: int) -> None:
    for folder in (inputs.teacher, inputs.student):
        sizes = {"hidden_size": 32 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        make_llama(folder, seed=0, num_hidden_layers=1, **sizes)


def edit_tokenizers(inputs: Inputs, name: str, **values: object) -> None:
    """Keys of a tokenizer file of both models."""
    for folder in (inputs.teacher, inputs.student):
        edit_json(folder / name, **values)


def only_a_vocabulary(inputs: Inputs) -> None:
    """vocab.json and merges.txt, and the name of a class that reads neither."""
    for folder in (inputs.teacher, inputs.student):
        model = read_json(folder / "tokenizer.json")["model"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")


WITHOUT_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
GO_TEMPLATE = TEMPLATE + "<|go|>"


def make_room(inputs: Inputs) -> None:
    inputs.set("training.sequence_length", 512)
    inputs.set("annotator.pack_length", 512)


CHECKPOINT_FAULTS: dict[str, tuple[Callable[[Inputs], object], list[str]]] = {
    "no folder": (lambda i: i.set("models.teacher", "/nowhere"), ["models.teacher = /nowhere", "no such folder"]),
    "no config": (lambda i: (i.student / "config.json").unlink(), ["student/config.json", "cannot read"]),
    "broken config": (lambda i: truncate(i.student / "config.json", 50), ["student/config.json", "not valid JSON"]),
    "another family": (
        lambda i: edit_json(i.teacher / "config.json", architectures=["MambaForCausalLM"]),
        ["teacher/config.json", "MambaForCausalLM", "must be one of"],
    ),
    "no weights": (lambda i: (i.teacher / "model.safetensors").unlink(), ["models.teacher", "no *.safetensors"]),
    "weights cut short": (
        lambda i: truncate(i.teacher / "model.safetensors", 100_000),
        ["teacher/model.safetensors", "cut short"],
    ),
    "weights cut in the header": (
        lambda i: truncate(i.student / "model.safetensors", 20),
        ["student/model.safetensors", "cut short"],
    ),
    "empty weights": (lambda i: truncate(i.student / "model.safetensors", 0), ["student/model.safetensors"]),
    "a listed file lost": (lambda i: lose_a_listed_file(i.student), ["models.student", "model-00002-of", "missing"]),
    "a broken index": (
        lambda i: (i.student / "model.safetensors.index.json").write_text("[]"),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "a tensor missing": (
        lambda i: drop_tensor(i.student / "model.safetensors", "model.norm.weight"),
        ["models.student", "model.norm.weight", "missing"],
    ),
    "a broken number": (
        lambda i: spoil_a_number(i.teacher / "model.safetensors"),
        ["models.teacher", "model.norm.weight", "1 value NaN or infinite"],
    ),
    "a head that is not the tied one": (
        lambda i: edit_json(i.student / "config.json", tie_word_embeddings=True),
        ["models.student", "tie_word_embeddings = true", "lm_head.weight", "set it to false"],
    ),
    "embedding of another size": (
        lambda i: shrink_embedding(i.student / "model.safetensors"),
        ["models.student", "embed_tokens", "(127, 64)", "(128, 64)"],
    ),
    "no end token": (
        lambda i: edit_end(i, []),
        ["student/generation_config.json", "eos_token_id = []", "at least one"],
    ),
    "no end token in config.json": (
        lambda i: [edit_end(i, None), edit_json(i.student / "config.json", eos_token_id=[])],
        ["student/config.json", "eos_token_id = []", "at least one"],
    ),
    "end tokens nowhere": (
        lambda i: [edit_end(i, None), edit_json(i.student / "config.json", eos_token_id=None)],
        ["student", "no eos_token_id"],
    ),
    "end token below 0": (lambda i: edit_end(i, -1), ["eos_token_id = -1", "must be a token id"]),
    "end token as text": (lambda i: edit_end(i, "2"), ["eos_token_id = '2'", "must be a token id"]),
    "end token as a fraction": (lambda i: edit_end(i, 2.0), ["eos_token_id = 2.0", "must be a token id"]),
    "end token true": (lambda i: edit_end(i, True), ["eos_token_id = True", "must be a token id"]),
    "end tokens in a list of lists": (lambda i: edit_end(i, [[2]]), ["eos_token_id = [[2]]", "must be a token id"]),
    "a null among the end tokens": (lambda i: edit_end(i, [2, None]), ["eos_token_id = [2, None]"]),
    "end token outside": (
        lambda i: edit_json(i.student / "generation_config.json", eos_token_id=128),
        ["models.student", "eos_token_id = 128", "below its vocab_size = 128"],
    ),
}

TOKENIZER_FAULTS: dict[str, tuple[Callable[[Inputs], object], list[str]]] = {
    "none": (lambda i: (i.teacher / "tokenizer.json").unlink(), ["models.teacher", "no tokenizer"]),
    "damaged": (lambda i: truncate(i.teacher / "tokenizer.json", 200), ["models.teacher", "cannot be loaded"]),
    "another vocabulary": (
        lambda i: make_tokenizer(i.student, more=("new",)),
        ["models.teacher", "models.student", "vocabulary", "'new' has id none", "id 99"],
    ),
    "another end token": (lambda i: make_tokenizer(i.student, eos_token="<s>"), ["eos_token_id", "2 against 1"]),
    "other end ids": (
        lambda i: edit_json(i.teacher / "generation_config.json", eos_token_id=[2, 0]),
        ["end tokens", "[0, 2] against [2]"],
    ),
    "a surplus below": (
        lambda i: [make_tokenizer(i.teacher, more=("a b", "c d")), make_tokenizer(i.student, more=("c d",))],
        ["vocabulary", "'a b' has id 99", "id none"],
    ),
    "the teacher's own end token alone": (
        lambda i: [
            make_tokenizer(i.teacher, more=("<end>",)),
            edit_json(i.teacher / "generation_config.json", eos_token_id=99),
        ],
        ["end tokens", "[] against [2]"],
    ),
    "a template with a token of the teacher's own": (
        lambda i: [
            make_tokenizer(i.teacher, template=GO_TEMPLATE, more=("<|go|>",), mask_token="<|go|>"),
            make_tokenizer(i.student, template=GO_TEMPLATE),
        ],
        ["the ids of a chat", "99]"],
    ),
    "the same tokens, other ids of a text": (
        lambda i: edit_json(i.student / "tokenizer.json", normalizer={"type": "Lowercase"}),
        ["the ids of a text", "'Hello big\\n x' is"],
    ),
    "a class that loses spaces": (only_a_vocabulary, ["models.teacher", "'Hello big\\n x' into"]),
    "a normaliser that loses spaces": (
        lambda i: edit_tokenizers(i, "tokenizer.json", normalizer=WITHOUT_SPACES),
        ["models.teacher", "'Hello big\\n x' into 'Hellobig\\nx'", "words and letters"],
    ),
    "a decoder that is not the pre-tokenizer's": (
        lambda i: edit_tokenizers(i, "tokenizer.json", decoder={"type": "Fuse"}),
        ["models.teacher", "'Hello big\\n x' into 'HelloĠbigĊĠx'"],
    ),
    "control tokens to be spelled out": (
        lambda i: edit_tokenizers(i, "tokenizer_config.json", split_special_tokens=True),
        ["models.teacher", "split_special_tokens = true"],
    ),
    "two ids of a token": (
        lambda i: edit_tokenizers(i, "tokenizer_config.json", added_tokens_decoder={"7": {"content": "</s>"}}),
        ["models.teacher", "'</s>' has id 7", "but 2 by tokenizer.json"],
    ),
    "another template": (
        lambda i: make_tokenizer(i.student, template=TEMPLATE.replace("assistant", "bot")),
        ["chat template", "'assistant", "'bot", "at character"],
    ),
    "no template": (
        lambda i: [
            (make_tokenizer(folder, template=None), (folder / "chat_template.jinja").unlink())
            for folder in (i.teacher, i.student)
        ],
        ["models.student", "no chat template"],
    ),
    "more ids than rows": (
        lambda i: [make_tokenizer(f, more=tuple(f"w{n}" for n in range(40))) for f in (i.teacher, i.student)],
        ["models.teacher", "128 embedding rows", "139 ids"],
    ),
}


def write_answers(path: Path, count: int, answered: int, answer: str = "yes") -> None:
    """Prompts, the first of which have a given response."""
    rows = [
        {"id": f"t{i}", "prompt": f"What is {i}?"} | ({"response": answer} if i < answered else {})
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


PICKY_TEMPLATE = "{% if messages[0]['content'] == 'Name 1 things.' %}{{ raise_exception('No!') }}{% endif %}" + TEMPLATE

PROMPT_FAULTS: dict[str, tuple[Callable[[Inputs], object], list[str]]] = {
    "no file": (lambda i: i.heldout.unlink(), ["heldout.jsonl", "No such file"]),
    "empty": (lambda i: i.train.write_text("\n"), ["train.jsonl", "no prompts"]),
    "not JSON": (lambda i: i.train.write_text('{"messages": [}'), ["train.jsonl:1", "not JSON"]),
    "not UTF-8": (lambda i: i.train.write_bytes(b"\xff\xfe"), ["train.jsonl", "utf-8"]),
    "no messages": (lambda i: i.train.write_text('{"text": "hi"}'), ["train.jsonl:1", "messages"]),
    "unknown role": (
        lambda i: i.train.write_text('{"messages": [{"role": "human", "content": "hi"}]}'),
        ["train.jsonl:1", "role", "assistant"],
    ),
    "an answer": (
        lambda i: i.train.write_text('{"messages": [{"role": "assistant", "content": "hi"}]}'),
        ["train.jsonl:1", "last message"],
    ),
    "an id twice": (
        lambda i: i.train.write_text(i.train.read_text() + i.train.read_text().splitlines()[0]),
        ["train.jsonl:7", "'t0'", "line 1"],
    ),
    "too long": (
        lambda i: write_prompts(i.train, {"ok": "hi", "long": "x" * 60, "longer": "x" * 90}),
        ["train.jsonl", "'long' has 79 tokens", "max_prompt_tokens = 64", "2 such prompts, the longest 109"],
    ),
    "in both files": (
        lambda i: write_prompts(i.heldout, {"new": "hm", "same": "What is 3 plus 3?"}),
        ["heldout.jsonl", "'same'", "'t3'", "train.jsonl", "held-out"],
    ),
    "lines that are none": (
        lambda i: i.train.write_text('{"prompt": "a\u2028b"} {"prompt": "c"}'),
        ["train.jsonl:1", "not JSON", "Extra data"],
    ),
    "a key that nothing reads": (
        lambda i: i.train.write_text('{"prompt": "hi", "anser": "x"}'),
        ["train.jsonl:1", "'anser' is read by nothing", "prompts.columns.unused"],
    ),
    "a setting the template has not": (
        lambda i: i.set("prompts.chat_template_kwargs", {"enable_thinking": False}),
        ["train.jsonl:1", "'t0'", "does not read 'enable_thinking'"],
    ),
    "a setting that is none": (
        lambda i: i.set("prompts.chat_template_kwargs", {"messages": []}),
        ["prompts.chat_template_kwargs", "messages is not a setting"],
    ),
    "a system turn of plain texts": (
        lambda i: [i.set("prompts.format", "text"), i.set("prompts.system", "x")],
        ["prompts", "system = 'x'", "format = 'text'"],
    ),
    "chats as plain texts": (lambda i: i.set("prompts.format", "text"), ["train.jsonl:1", "holds a chat"]),
    "no parquet file": (
        lambda i: [i.train.rename(i.root / "t.parquet"), i.set("prompts.train", str(i.root / "t.parquet"))],
        ["t.parquet", "not a readable parquet file"],
    ),
    "no given response": (
        lambda i: i.set("warmup.source", "data"),
        ["warmup.source = 'data'", "train.jsonl", "gives no response", "'response'"],
    ),
    "fewer given responses": (
        lambda i: [write_answers(i.train, 6, 2), i.set("warmup", {"source": "data", "prompts": 3})],
        ["warmup.prompts = 3", "the 2 given responses"],
    ),
    "too few for the share": (
        lambda i: [write_answers(i.train, 6, 2), i.set("rounds.given_share", 0.5)],
        ["rounds.given_share = 0.5", "wants 6 given responses beside the 6 others", "the 2 given responses"],
    ),
    "a given response that is too long": (
        lambda i: [write_answers(i.train, 6, 2, "x" * 40), i.set("warmup.source", "data")],
        ["train.jsonl", "prompt 't0''s given response has 41 tokens", "rollout.max_new_tokens = 32", "2 such prompts"],
    ),
    "refused by the template": (
        lambda i: [make_tokenizer(folder, template=PICKY_TEMPLATE) for folder in (i.teacher, i.student)],
        ["heldout.jsonl", "'h1'", "chat template", "No!"],
    ),
}

SIZE_FAULTS: dict[str, tuple[Callable[[Inputs], object], list[str]]] = {
    "context": (
        lambda i: [i.set("prompts.max_prompt_tokens", 250), make_room(i)],
        ["prompts.max_prompt_tokens + rollout.max_new_tokens = 282", "max_position_embeddings = 256"],
    ),
    "width of the student": (
        lambda i: i.set("training.tensor_model_parallel_size", 5),
        ["training.tensor_model_parallel_size = 5", "intermediate_size = 96", "models.student"],
    ),
    "width of the teacher": (
        lambda i: i.set("annotator.tensor_model_parallel_size", 5),
        ["annotator.tensor_model_parallel_size = 5", "intermediate_size = 96", "models.teacher"],
    ),
    "layers": (
        lambda i: i.set("training.pipeline_model_parallel_size", 2),
        ["training.pipeline_model_parallel_size = 2", "num_hidden_layers = 1", "models.student"],
    ),
    "engine ranks": (
        lambda i: i.set("rollout.tensor_model_parallel_size", 4),
        ["rollout.tensor_model_parallel_size = 4", "num_attention_heads = 2"],
    ),
    "key-value heads of the engine": (
        lambda i: [edit_heads(i, 6, 3), i.set("rollout.tensor_model_parallel_size", 2)],
        ["rollout.tensor_model_parallel_size = 2", "num_key_value_heads = 3", "multiple"],
    ),
    "width of the engine": (
        lambda i: [edit_heads(i, 5, 5), i.set("rollout.tensor_model_parallel_size", 5)],
        ["rollout.tensor_model_parallel_size = 5", "intermediate_size = 96"],
    ),
    "temperature": (lambda i: i.set("rollout.temperature", 3.0), ["rollout.temperature = 3.0", "equal to 2"]),
    "more likely tokens than tokens": (
        lambda i: i.set("annotator.top_k", 120),
        ["annotator.top_k = 120", "the tokenizer's 99 ids"],
    ),
    "top-k": (lambda i: i.set("annotator.top_k", 129), ["annotator.top_k = 129", "vocab_size = 128"]),
    "prompts of a round": (
        lambda i: i.set("rounds.prompts_per_round", 7),
        ["rounds.prompts_per_round = 7", "6 prompts", "train.jsonl"],
    ),
    "prompts of the warm-up": (
        lambda i: i.set("warmup.prompts", 7),
        ["warmup.prompts = 7", "6 prompts", "train.jsonl"],
    ),
    "nothing to train on": (lambda i: i.set("rounds.count", 0), ["rounds.count = 0", "needs a warm-up"]),
    "several given responses for a prompt": (
        lambda i: i.set("warmup", {"source": "data", "samples_per_prompt": 2}),
        ["warmup.samples_per_prompt = 2", "must be 0 or 1"],
    ),
    "a share of all": (lambda i: i.set("rounds.given_share", 1.0), ["rounds.given_share = 1.0", "less than 1"]),
    "unknown key": (lambda i: i.set("training.learning_rate", 1.0), ["training.learning_rate", "did you mean"]),
}

ALL_FAULTS = {
    f"{group}: {name}": fault
    for group, faults in (
        ("checkpoint", CHECKPOINT_FAULTS),
        ("tokenizer", TOKENIZER_FAULTS),
        ("prompts", PROMPT_FAULTS),
        ("sizes", SIZE_FAULTS),
    )
    for name, fault in faults.items()
}


@pytest.mark.parametrize("fault", ALL_FAULTS)
def test_each_fault_is_refused_in_one_line(inputs: Inputs, refuse: Refuse, fault: str) -> None:
    spoil, words = ALL_FAULTS[fault]
    spoil(inputs)
    line = refuse()
    assert all(word in line for word in words), line
    assert not inputs.run.exists()


def test_good_inputs_pass(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(inputs.path)]) == 0
    assert not inputs.run.exists()
    said = capsys.readouterr()
    assert "train.jsonl: 6 prompts" in said.out
    assert said.err == ""


def test_null_end_token_is_that_of_the_other_file(inputs: Inputs) -> None:
    edit_end(inputs, None)
    assert main(["check", str(inputs.path)]) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_padding_rows_may_differ(inputs: Inputs, ranks: int) -> None:
    make_llama(inputs.teacher, seed=0, vocab_size=160)
    inputs.set("annotator.tensor_model_parallel_size", ranks)
    assert main(["check", str(inputs.path)]) == 0


def test_prepare_writes_what_the_roles_read(inputs: Inputs) -> None:
    assert main(["prepare", str(inputs.path)]) == 0
    run = RunDirectory(inputs.run)
    prompts = load_prompt_set(run.prompts("heldout"))
    assert prompts.names == ["h0", "h1", "h2"]
    # <s> and newline of the template around the words, as make_tokenizer numbers them
    assert prompts[0][0] == 1
    assert len(prompts[0]) == len("_user\nName 0 things._\n_assistant\n")
    assert read_json(run.provenance) == provenance(inputs.config)
    assert read_json(run.provenance)["packages"]["torch"]


def test_preparing_again_touches_nothing_but_launch_settings(inputs: Inputs) -> None:
    assert main(["prepare", str(inputs.path)]) == 0
    before = snapshot(inputs.run)
    assert main(["prepare", str(inputs.path)]) == 0
    assert snapshot(inputs.run) == before
    assert main(["prepare", str(inputs.path), "--set", "launch.turns=off"]) == 0
    changed = {name for name, content in (snapshot(inputs.run) or {}).items() if before and before[name] != content}
    assert changed == {str(inputs.run / "config.toml")}


def test_the_trainers_layout_may_change_between_starts(inputs: Inputs) -> None:
    assert main(["prepare", str(inputs.path)]) == 0
    inputs.set("training.tensor_model_parallel_size", 2)
    inputs.set("training.distributed_optimizer", True)
    assert main(["prepare", str(inputs.path)]) == 0
    assert load_config(inputs.run / "config.toml").training.tensor_model_parallel_size == 2


def test_an_interrupted_preparation_is_continued(inputs: Inputs) -> None:
    assert main(["prepare", str(inputs.path)]) == 0
    before = snapshot(inputs.run)
    (inputs.run / "config.toml").unlink()
    (inputs.run / "prompts" / "train" / "ids.npy").write_bytes(b"half")
    (inputs.run / ".config.toml.x1.tmp").write_bytes(b"")
    assert main(["prepare", str(inputs.path)]) == 0
    (inputs.run / ".config.toml.x1.tmp").unlink()
    assert snapshot(inputs.run) == before


def test_another_configuration_may_not_use_the_directory(inputs: Inputs, refuse: Refuse) -> None:
    assert main(["prepare", str(inputs.path)]) == 0
    main(["prepare", str(inputs.path)])
    inputs.set("training.lr", 3e-4)
    inputs.set("launch.turns", "off")
    for command in (["prepare"], ["check"], ["run"], ["trainer"], ["annotator"], ["rollout", "--policy", "teacher"]):
        line = refuse(*command, str(inputs.path))
        assert "training.lr = 0.0003" in line
        assert "prepared with 1e-05" in line


def test_foreign_folders_are_left_alone(inputs: Inputs, refuse: Refuse) -> None:
    inputs.run.mkdir()
    (inputs.run / "thesis.tex").write_text("important")
    assert "holds thesis.tex but no config.toml" in refuse()
    inputs.set("run_directory", str(inputs.train))
    assert "is a file" in refuse()
    inputs.set("run_directory", str(inputs.train / "below"))
    assert "cannot be created" in refuse() or "Not a directory" in refuse()


def test_roles_need_a_prepared_directory(inputs: Inputs, refuse: Refuse) -> None:
    for role in ("trainer", "annotator", "rollout"):
        assert "not prepared" in refuse(role, str(inputs.path))


def test_a_copied_run_directory_means_itself(inputs: Inputs, refuse: Refuse) -> None:
    from megatron_npd.prepare.prepare import load_run_config

    assert main(["prepare", str(inputs.path)]) == 0
    copy = inputs.root / "copy"
    inputs.run.rename(copy)
    assert load_run_config(copy / "config.toml").run_directory == str(copy)
    assert load_run_config(inputs.path).run_directory == str(inputs.run)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["COMMAND"]),
        (["rum"], ["invalid choice", "rum"]),
        (["run"], ["CONFIG"]),
        (["run", "a.toml", "--st", "x"], ["--st"]),
        (["rollout", "a.toml", "--policy", "nobody"], ["--policy", "nobody"]),
        (["inspect", "run", "--kept", "--rejected"], ["--rejected", "--kept"]),
        (["report", "/nowhere"], ["/nowhere", "config.toml"]),
        (["check", "/nowhere.toml"], ["/nowhere.toml", "No such file"]),
    ],
)
def test_wrong_usage_is_one_line_too(refuse: Refuse, argv: list[str], words: list[str]) -> None:
    line = refuse(*argv) if argv else refuse_nothing()
    assert all(word in line for word in words), line


def refuse_nothing() -> str:
    """`npd` alone, as a process of its own: what a shell sees."""
    done = subprocess.run([sys.executable, "-m", "megatron_npd.cli"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_a_whole_process_says_one_line(inputs: Inputs) -> None:
    inputs.set("annotator.top_k", 129)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_npd.cli", "run", str(inputs.path)],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONWARNINGS": "default"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "npd: error: annotator.top_k = 129: must not exceed the vocab_size = 128\n"
