import json
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import SecretStr

from model.backends import OneOf
from server.config import ConfigError, Settings, describe_settings, load_settings, wants_print_config

KEYS = ["correct-horse-battery", "staple/2+more=chars~~"]


def other_value(name: str, folder: Path) -> Any:
    """Return a legal value of a setting that is not its default, as a Python object."""
    field = Settings.model_fields[name]
    if name == "api_keys":
        return tuple(SecretStr(key) for key in KEYS)
    if name == "api_key_file":
        (folder / "keys").write_text(KEYS[0])
        return folder / "keys"
    choices = [choice for rule in field.metadata if isinstance(rule, OneOf) for choice in rule.names()]
    kinds = (field.annotation, *get_args(field.annotation), *choices)
    if bool in kinds:
        return not field.default
    if int in kinds:
        return (field.default or 1) + 1
    if float in kinds:
        return (field.default or 1) + 0.5
    if Path in kinds:
        return folder / "else\\where"
    return next((kind for kind in kinds if isinstance(kind, str) and kind != field.default), "::1")


def as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(as_text(item) for item in value)
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def as_toml(value: Any) -> str:
    if isinstance(value, tuple):
        return json.dumps([as_text(item) for item in value])
    return json.dumps(value if isinstance(value, bool | int | float) else as_text(value))


def write(file: Path, text: str) -> list[str]:
    file.write_text(text)
    return ["--config", str(file)]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def complaint(argv: list[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(argv, environ=environ or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# where settings come from


def test_every_setting_has_a_default():
    assert load_settings([], environ={"HOME": "x"}) == Settings()


def test_only_this_machine_can_connect_unless_told_otherwise():
    assert Settings().host == "127.0.0.1"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_flag_a_variable_and_a_line_of_the_file_say_the_same(tmp_path, name):
    value = other_value(name, tmp_path)
    text = as_text(value)
    assert value != getattr(Settings(), name)
    settings = [
        load_settings([], environ={"ALLATTN_" + name.upper(): text}),
        load_settings(write(tmp_path / "a.toml", f"{name} = {as_toml(value)}"), environ={}),
    ]
    if name != "api_keys":
        settings.append(load_settings([flag(name), text], environ={}))
    assert all(one == Settings(**{name: value}) for one in settings)
    assert all(getattr(one, name) == value for one in settings)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_flags_win_over_variables_and_variables_over_the_file(tmp_path, name):
    value = other_value(name, tmp_path)
    wrong_file = write(tmp_path / "a.toml", f"{name} = [[]]")
    environ = {"ALLATTN_" + name.upper(): as_text(value)}
    assert getattr(load_settings(wrong_file, environ=environ), name) == value
    if name != "api_keys":
        argv = [*wrong_file, flag(name), as_text(value)]
        assert getattr(load_settings(argv, environ={"ALLATTN_" + name.upper(): "\0"}), name) == value


def test_the_file_can_be_named_in_the_environment_and_by_a_flag_that_wins(tmp_path):
    one, two = write(tmp_path / "1.toml", "port = 1"), write(tmp_path / "2.toml", "port = 2")
    assert load_settings([], environ={"ALLATTN_CONFIG": one[1]}).port == 1
    assert load_settings(two, environ={"ALLATTN_CONFIG": one[1]}).port == 2


def test_help_names_every_flag_and_says_why_keys_have_none(capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"], environ={})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(flag(name) + " " in text for name in Settings.model_fields if name != "api_keys")
    assert "There is no --api-keys: every user" in text
    assert "ALLATTN_API_KEYS" in text
    assert all(name in text for name in ("--config", "--print-config", "ALLATTN_CONFIG"))


# wrong settings


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (["--prot", "1"], {}, "--prot is not a flag; there are: --bundle, --backend, --host, --port,"),
        (["--prot=1"], {}, "--prot is not a flag"),
        (["--por", "1"], {}, "--por is not a flag"),
        (["stray"], {}, "stray is not a flag"),
        (["--port"], {}, "--port"),
        (["--port", "abc"], {}, "--port = 'abc'"),
        (["--port", "70000"], {}, "65535"),
        (["--dtype", "int8"], {}, "'float32' or 'bfloat16'"),
        (
            ["--backend", "tpu"],
            {},
            "--backend = 'tpu': Input should be 'auto', 'native', 'torch', 'torchscript', 'onnx' or 'pt2'",
        ),
        (["--batch-invariant", "perhaps"], {}, "--batch-invariant = 'perhaps'"),
        ([], {"ALLATTN_PROT": "1"}, "ALLATTN_PROT is not a setting; there are: bundle, backend, host, port,"),
        ([], {"ALLATTN_NUM_ROWS": "0"}, "ALLATTN_NUM_ROWS = '0'"),
        ([], {"ALLATTN_PRINT_CONFIG": "1"}, "ALLATTN_PRINT_CONFIG is not a setting"),
        (["--config", "nowhere.toml"], {}, "nowhere.toml: No such file"),
    ],
)
def test_a_wrong_flag_or_variable_is_one_line_that_names_it(argv, environ, words):
    assert words in complaint(argv, environ)


@pytest.mark.parametrize("text", ["prot = 1", 'port = "abc"', "port = ", "[port]\na = 1", "config = 'a'", "\xff"])
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text):
    (tmp_path / "server.toml").write_bytes(text.encode("latin-1"))
    assert "server.toml: " in complaint(["--config", str(tmp_path / "server.toml")])


# API keys


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("short-key-123", "key 1 of 1: a key has at least 16 visible ASCII characters"),
        (f"{KEYS[0]},short", "key 2 of 2"),
        (KEYS[0] + "\u00e9", "key 1 of 1"),
        ("secret with blanks in it", "key 1 of 1"),
        ("", "names no key"),
        (" , ", "names no key"),
    ],
)
def test_a_wrong_key_is_told_by_its_place_and_never_shown(keys, words):
    text = complaint([], {"ALLATTN_API_KEYS": keys})
    assert text.startswith("ALLATTN_API_KEYS: ")
    assert words in text
    assert all(part not in text for part in keys.replace(",", " ").split())


@pytest.mark.parametrize("value", ['["short-secret"]', '"short-secret"', f'["{KEYS[0]}", 3512]', "3512", "{}"])
def test_a_wrong_key_in_the_file_is_never_shown(tmp_path, value):
    text = complaint(write(tmp_path / "a.toml", f"api_keys = {value}"))
    assert "a.toml: api_keys: " in text
    assert not any(secret in text for secret in ("short-secret", KEYS[0], "3512"))


@pytest.mark.parametrize("argv", [["--api-keys", KEYS[0]], [f"--api-keys={KEYS[0]}"]])
def test_keys_are_no_argument_since_every_user_can_read_those(argv):
    text = complaint(argv)
    assert "--api-key-file or ALLATTN_API_KEYS" in text
    assert KEYS[0] not in text


@pytest.mark.parametrize("argv", [["--api-key", KEYS[0]], [f"--key={KEYS[0]}"]])
def test_what_follows_an_unknown_flag_is_not_repeated(argv):
    assert KEYS[0] not in complaint(argv)


def test_a_file_of_keys_has_one_a_line_with_blanks_and_comments(tmp_path):
    (tmp_path / "keys").write_bytes(f"\ufeff# for the team\n\n{KEYS[0]}\r\n  {KEYS[1]} \n".encode())
    settings = load_settings(
        ["--api-key-file", str(tmp_path / "keys")], environ={"ALLATTN_API_KEYS": "from-the-environment"}
    )
    found = [key.get_secret_value() for key in settings.all_api_keys()]
    assert found == ["from-the-environment", *KEYS]
    assert Settings().all_api_keys() == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "holds no key"),
        (b"# none yet\n\n", "holds no key"),
        (b"\n# a\nshort-secret\n", "line 3: a key has at least 16"),
        (b"short-secret-but-\xff-not-text\n", "line 1"),
    ],
)
def test_a_wrong_file_of_keys_is_told_by_its_line_and_never_shown(tmp_path, content, words):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    text = complaint([], {"ALLATTN_API_KEY_FILE": str(path)})
    assert text.startswith(f"ALLATTN_API_KEY_FILE = '{path}': ")
    assert words in text
    assert "short-secret" not in text


def test_a_directory_is_no_file_of_keys(tmp_path):
    assert "Is a directory" in complaint(["--api-key-file", str(tmp_path)])


def test_keys_do_not_show_in_any_form_of_the_settings(tmp_path):
    settings = load_settings([], environ={"ALLATTN_API_KEYS": ",".join(KEYS)})
    shown = f"{settings} {settings!r} {settings.all_api_keys()} {settings.model_dump()} {settings.model_dump_json()}"
    assert not any(key in shown for key in KEYS)
    with pytest.raises(ValueError, match="key 1 of 1") as caught:
        Settings(api_keys=("short-secret",))
    assert "short-secret" not in str(caught.value)


# --print-config


def described(argv: list[str], environ: dict[str, str] | None = None) -> str:
    assert wants_print_config([*argv, "--print-config"])
    return describe_settings([*argv, "--print-config"], environ=environ or {})


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name != "api_keys"])
def test_what_is_printed_can_be_read_back_to_the_same_settings(tmp_path, name):
    environ = {"ALLATTN_" + name.upper(): as_text(other_value(name, tmp_path))}
    text = described([], environ)
    assert load_settings(write(tmp_path / "back.toml", text), environ={}) == load_settings([], environ=environ)


@pytest.mark.parametrize("bundle", ['a "b" \\ c', "tab\tand\nline", "caf\u00e9 \U0001f600", "\x7f\x01", "#", "'''"])
def test_any_text_can_be_read_back(tmp_path, bundle):
    text = described(["--bundle", bundle])
    assert tomllib.loads(text)["bundle"] == bundle
    assert load_settings(write(tmp_path / "back.toml", text), environ={}).bundle == Path(bundle)


def test_each_line_tells_where_its_value_comes_from(tmp_path):
    (tmp_path / "keys").write_text(KEYS[1])
    environ = {"ALLATTN_NUM_ROWS": "7", "ALLATTN_API_KEYS": KEYS[0], "ALLATTN_API_KEY_FILE": str(tmp_path / "keys")}
    file = write(tmp_path / "odd\nname.toml", 'num_rows = 3\ndtype = "bfloat16"\n')
    lines = described(["--port", "81", *file], environ).splitlines()
    assert len(lines) == len(Settings.model_fields)
    for line in (
        "port = 81  # --port",
        "num_rows = 7  # ALLATTN_NUM_ROWS",
        f'dtype = "bfloat16"  # {tmp_path}/odd?name.toml: dtype',
        'host = "127.0.0.1"  # default',
        "batch_invariant = true  # default",
        "# timeout_s is not set  # default",
        "# api_keys: 1, not shown  # ALLATTN_API_KEYS",
        f'api_key_file = "{tmp_path}/keys"  # ALLATTN_API_KEY_FILE',
    ):
        assert line in lines
    assert not any(key in line for line in lines for key in KEYS)


def test_a_wrong_setting_is_told_instead_of_printed():
    with pytest.raises(ConfigError, match="--port = '-1'"):
        described(["--port", "-1"])
    with pytest.raises(ConfigError, match="--prot is not a flag"):
        wants_print_config(["--print-config", "--prot", "1"])
    assert not wants_print_config(["--port", "1"])
