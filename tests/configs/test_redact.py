"""What counts as a secret, and what does not."""

import json
import time

import pytest

from configs.errors import ConfigError
from configs.load import parse
from configs.redact import holds_secret, is_secret, redact, redacted


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("data.options.hf_token=hush", "data.options.hf_token=***"),
        ("WANDB_API_KEY=hush --port 3", "WANDB_API_KEY=*** --port 3"),
        ("  api_key: hush is the word\nname: run", "  api_key: ***\nname: run"),
        ('password: "hush hush" # of the proxy', 'password: "***" # of the proxy'),
        ('{"api_key": "hush,hush", "step": 3}', '{"api_key": "***", "step": 3}'),
        ('{"command": ["a", "x.token=hush,hush", "b"]}', '{"command": ["a", "x.token=***", "b"]}'),
        ("{'secret': 'hush'}", "{'secret': '***'}"),
        ('"{\\"password\\": \\"hush\\"}"', '"{\\"password\\": \\"***\\"}"'),
        ("sent Authorization: Bearer hush.hush", "sent Authorization: Bearer ***"),
        ("https://me:hush@host/x?token=hush&y=1", "https://***@host/x?token=***&y=1"),
        ("git+https://hush@host/x.git", "git+https://***@host/x.git"),
        ("failed with hf_abcdefghijklmnopqrst!", "failed with ***!"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("serve --auth-token hush --port 3", "serve --auth-token *** --port 3"),
        ("Set-Cookie: paceline_1=hush; HttpOnly", "Set-Cookie: ***"),
        ("DB_PASS=hush1 MYSQL_PWD=hush2", "DB_PASS=*** MYSQL_PWD=***"),
        ("s3/x?X-Amz-Signature=hush&a=1", "s3/x?X-Amz-Signature=***&a=1"),
        ("-----BEGIN RSA PRIVATE KEY-----\nhush\n-----END RSA PRIVATE KEY-----", "***"),
    ],
)
def test_a_secret_is_taken_out_and_the_rest_stays(text: str, kept: str) -> None:
    assert redact(text) == kept
    assert redact(kept) == kept


@pytest.mark.parametrize(
    "text",
    [
        "data.max_prompt_tokens=128",
        '{"tokens": 12, "token_ids": [1, 2], "draft_tokens": 5, "tokens_per_s": 3.5, "num_tokens": 7}',
        '{"eos_token": "<|im_end|>", "stop_token": "</s>"}',
        "token: null",
        "with token: null, secret=None, token=3",
        "http://127.0.0.1:8470/ and https://host/path@2x.png",
        "step 3 of 10, tokens: 5, key: value, monkey=banana",
        "sampled tokens give the secret away",
        "PWD=/work/main, --max-tokens 5, a bypass: no; forward pass: done; --token --port 3",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_a_secret_of_the_environment_is_found_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", 'hu"sh\\hush')
    monkeypatch.setenv("SOME_TOKEN", "off")
    assert redact('it said hu"sh\\hush, and turned off') == "it said ***, and turned off"
    assert redact(json.dumps({"said": 'hu"sh\\hush'})) == '{"said": "***"}'


def test_values_are_redacted_by_name_and_content() -> None:
    value = {
        "api_key": "hush",
        "token": None,
        "list": ["a", "token=hush"],
        "deep": {"url": "http://me:hush@host"},
        "n": 3,
    }
    assert redacted(value) == {
        "api_key": "***", "token": None, "list": ["a", "token=***"], "deep": {"url": "http://***@host"}, "n": 3
    }  # fmt: skip
    assert is_secret("hf_token", "hush") and not is_secret("hf_token", 3) and not is_secret("max_tokens", "hush")
    assert holds_secret("https://me:hush@host") and not holds_secret("your password: {question}")


def test_long_lines_take_no_longer_than_their_length() -> None:
    begun = time.thread_time()
    redact("a" * 200_000 + " " + "token_" * 30_000)
    assert time.thread_time() - begun < 5.0


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.options={api_key: hush}", "data.options"),
        ("data.options={url: 'https://me:hush@host/rows'}", "data.options"),
        ("model=https://me:hush@host/model", "model"),
    ],
)
def test_a_config_holds_no_secret_and_the_refusal_does_not_repeat_it(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=.*set it in the environment") as caught:
        parse("data: {name: chain_sum}\n", [override])
    assert "hush" not in str(caught.value)
