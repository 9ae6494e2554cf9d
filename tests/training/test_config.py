"""The configuration of a run: the TOML file, the flags, what both reject, and every configuration in configs/."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from training.config import ConfigError, RunConfig, load_config
from training.optim import learning_rate

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = """
out = "bundles/small"
[model]
num_layers = 1
width = 8
num_heads = 2
num_persistent = 4
max_span = 16
[data]
name = "shakespeare"
batch = 2
block = 4
[optim]
lr = 0.1
max_steps = 10
"""
# arXiv 1907.01470: layers, N, L, block, symbols that occur, millions of parameters, updates, of these at lr / 10
PAPER = {
    "enwik8_18l": (18, 1024, 8192, 512, 205, 39, 480_000, 30_000),
    "enwik8_36l": (36, 2048, 8192, 512, 205, 114, 210_000, 10_000),
    "text8_18l": (18, 1024, 8192, 512, 27, 38, 480_000, 30_000),
    "text8_36l": (36, 2048, 8192, 512, 27, 114, 210_000, 10_000),
    "wikitext103_36l": (36, 2048, 2048, 256, 267735, 133, 850_000, 50_000),
}


def write(folder: Path, text: str = SMALL) -> str:
    path = folder / "run.toml"
    path.write_text(text)
    return str(path)


def with_line(section: str, line: str) -> str:
    """SMALL with one more line in a section ("" = the top level), which is added if it is missing."""
    if not section:
        return line + SMALL
    heading = f"[{section}]\n"
    return SMALL.replace(heading, heading + line + "\n") if heading in SMALL else SMALL + heading + line + "\n"


def settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description


def test_without_arguments_the_quickstart_is_read() -> None:
    assert load_config([]) == load_config([str(CONFIGS / "quickstart.toml")])


def test_flags_override_the_file_and_leave_the_rest_of_their_section(tmp_path: Path) -> None:
    config = load_config([write(tmp_path), "--optim.lr", "0.5", "--data.batch=7", "--optim.betas", "0.8,0.9"])
    assert (config.optim.lr, config.optim.max_steps, config.optim.betas) == (0.5, 10, (0.8, 0.9))
    assert (config.data.batch, config.data.block) == (7, 4)


def test_flags_reach_sections_that_the_file_does_not_have(tmp_path: Path) -> None:
    assert load_config([write(tmp_path), "--eval.tokens", "5"]).eval.tokens == 5


def test_a_flag_can_take_a_limit_away(tmp_path: Path) -> None:
    path = write(tmp_path, with_line("optim", "max_seconds = 60"))
    assert load_config([path]).optim.max_seconds == 60
    assert load_config([path, "--optim.max_seconds", "None"]).optim.max_seconds is None


def test_the_environment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "77")
    monkeypatch.setenv("OUT", "elsewhere")
    config = load_config([write(tmp_path)])
    assert (config.seed, config.out) == (1, Path("bundles/small"))


@pytest.mark.parametrize(
    ("section", "line", "words"),
    [
        ("", "sead = 3", ("sead = 3", "not a setting", "seed")),
        ("optim", "learning_rate = 3", ("optim.learning_rate = 3", "not a setting", "lr")),
        ("optimizer", "lr = 3", ("optimizer", "not a setting", "optim")),
        ("model", "vocab_size = 256", ("model.vocab_size = 256", "not a setting", "num_layers")),
        ("", 'seed = "x"', ("seed = 'x'", "integer")),
        ("", "seed = -1", ("seed = -1", "greater than or equal to 0")),
        ("", 'device = "tpu"', ("device = 'tpu'", "auto|cpu|cuda")),
        ("", 'dtype = "int8"', ("dtype = 'int8'", "'float32' or 'bfloat16'")),
        ("data", "reset_prob = 1.5", ("data.reset_prob = 1.5", "less than or equal to 1")),
        ("eval", "tokens = 2.5", ("eval.tokens = 2.5", "integer")),
        ("tokenizer", 'kind = "words"', ("tokenizer.kind = 'words'", "'bytes', 'bpe' or 'word'")),
        ("tokenizer", 'kind = "bpe"', ("tokenizer", "vocab_size is missing")),
        ("tokenizer", "vocab_size = 9", ("tokenizer", "vocab_size = 9", "'bytes' always has 256")),
        ("optim", "betas = [0.9, 1.0]", ("optim.betas.1 = 1.0", "less than 1")),
        ("optim", "grad_clip = inf", ("optim.grad_clip = inf", "finite")),
        ("optim", "eps = nan", ("optim.eps = nan", "finite")),
        ("checkpoint", "keep = 0", ("checkpoint.keep = 0", "greater than or equal to 1")),
        ("model", "dropout = 1.0", ("model.dropout = 1.0", "less than 1")),
    ],
)
def test_a_wrong_line_of_the_file_is_named_with_its_value_and_what_is_allowed(
    section: str, line: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([write(tmp_path, with_line(section, line))])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optim.learning_rate", "3"], ("--optim.learning_rate 3", "--help")),
        (["--optim.l", "3"], ("--optim.l 3",)),
        (["--optim.lr"], ("--optim.lr", "expected one argument")),
        (["--optim.lr", "fast"], ("optim.lr = 'fast'", "number")),
        (["--optim.lr", "-1"], ("optim.lr = '-1'", "greater than 0")),
        (["--optim.lr", "inf"], ("optim.lr = 'inf'", "finite")),
        (["--data.batch", "2.5"], ("data.batch = '2.5'", "integer")),
        (["--model.width", "9"], ("width 9", "num_heads 2")),
        (["--tokenizer.kind", "bpe"], ("vocab_size is missing",)),
        (["second.toml"], ("second.toml",)),
    ],
)
def test_a_wrong_flag_is_named_with_its_value_and_what_is_allowed(
    flags: list[str], words: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([write(tmp_path), *flags])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [("seed = 1", ("out is missing", "model is missing", "data is missing", "optim is missing")), ("= 1", ("TOML",))],
)
def test_an_unfinished_file_says_what_is_wrong(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([write(tmp_path, text)])
    assert all(word in str(caught.value) for word in words)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml cannot be read"):
        load_config([str(tmp_path / "gone.toml")])
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml is not valid TOML"):
        load_config([str(tmp_path / "binary.toml")])


def test_a_configuration_cannot_change_after_birth(tmp_path: Path) -> None:
    config = load_config([write(tmp_path)])
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 2.0


def test_a_configuration_survives_its_dump(tmp_path: Path) -> None:
    config = load_config([write(tmp_path), "--tokenizer.kind", "bpe", "--tokenizer.vocab_size", "300"])
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_every_setting_is_documented_where_it_is_defined() -> None:
    assert [name for name, description in settings(RunConfig) if not description] == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_writes_the_bundle_of_its_name(path: Path) -> None:
    assert load_config([str(path)]).out == Path("bundles") / path.stem


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_runs_have_its_shapes_parameters_and_updates(name: str) -> None:
    layers, pairs, span, block, vocabulary, millions, updates, last = PAPER[name]
    config = load_config([str(CONFIGS / f"{name}.toml")])
    model = config.model.with_vocabulary(vocabulary)
    assert (model.num_layers, model.width, model.num_heads) == (layers, 512, 8)
    assert (model.num_persistent, model.max_span) == (pairs, span)
    assert (config.data.block, config.data.batch) == (block, 64)
    assert round(model.num_parameters / 1e6) == millions
    assert config.optim.max_steps == updates
    assert _rate(config, updates - last - 1) == pytest.approx(config.optim.lr)
    assert _rate(config, updates - last) == pytest.approx(config.optim.lr / 10)
    assert _rate(config, updates - 1) == pytest.approx(config.optim.lr / 10)


def _rate(config: RunConfig, step: int) -> float:
    return learning_rate(config.optim, step=step, share=step / config.optim.max_steps)
