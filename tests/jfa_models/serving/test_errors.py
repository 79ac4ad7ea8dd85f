"""What is refused, and how: the status, the message and the field of each error."""

import json

import httpx2 as httpx
import pytest
from random_adapters import random_adapter
from running import PATIENCE
from servers import new_engine, serving

from jfa_models.checkpoints.peft import save_adapter
from jfa_models.serving.app import Server, Settings
from jfa_models.serving.metrics import Metrics
from jfa_models.serving.runner import Runner
from jfa_models.serving.server import bind

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
TEXT = {"prompt": "hi", "max_tokens": 3}
FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def root(model, tmp_path_factory):
    """A folder with an adapter, next to one that requests must not reach."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("in/sql", "out"):
        save_adapter(folder / name, random_adapter(model, 2, rank=4))
    return folder / "in"


@pytest.fixture(scope="module")
def client(model, root):
    settings = dict(
        keys=("first-key", "second-key"), hosts=("127.0.0.1",), adapter_root=root, max_body=20_000, max_grammar=2000
    )
    headers = {"authorization": "Bearer second-key"}
    with (
        serving(new_engine(model), **settings) as served,
        httpx.Client(base_url=served.url, headers=headers, timeout=PATIENCE) as client,
    ):
        yield client


def refused(response, status, words, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert words in error["message"], error
    assert param is None or error["param"] == param, error
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    ("fields", "words", "param"),
    [
        ({"suffix": "x"}, "there is no field 'suffix': text is continued at its end only", "suffix"),
        ({"best_of": 2}, "use n", "best_of"),
        ({"tempreature": 1}, "the fields of this request are", "tempreature"),
        ({"stream_options": {"usage": True}}, "there is no field 'stream_options.usage'", "stream_options.usage"),
        ({"temperature": "hot"}, "temperature: expected", "temperature"),
        ({"temperature": -1}, "temperature must be", "temperature"),
        ({"max_tokens": 0}, "max_tokens must be an integer", "max_tokens"),
        ({"max_tokens": 5000}, "together more than", None),
        ({"n": 300}, "300 sequences are more than 256", None),
        ({"n": 10**20}, "n must be", "n"),
        ({"stop": ["x"] * 17}, "stop has 17 strings", "stop"),
        ({"logit_bias": {"x": 1}}, "the keys must be token ids", "logit_bias"),
        ({"logit_bias": {"999": 1}}, "logit_bias must contain ids from 0 to 271", "logit_bias"),
        ({"prompt": ""}, "prompt is empty", "prompt"),
        ({"prompt": ["a", 1]}, "prompt must be a list of", "prompt"),
        ({"prompt": [999]}, "token ids must be 0 to 271", None),
        ({"prompt": None}, "prompt: expected", "prompt"),
        ({"timeout": 0}, "timeout must be more than 0", "timeout"),
        ({"structured_outputs": {"regex": "("}}, "the regex cannot be enforced", None),
        ({"structured_outputs": {"regex": "a" * 3000}}, "more than 2000", "structured_outputs"),
        ({"structured_outputs": {}}, "exactly one of", None),
        ({"model": "other"}, "there is no model 'other'; there is tiny", "model"),
        ({"service_tier": "flex"}, 'it must be one of "auto", "default"', "service_tier"),
    ],
)
def test_completions_that_are_refused(client, fields, words, param):
    status = 404 if "model" in fields else 400
    refused(client.post("/v1/completions", json=TEXT | fields), status, words, param)


@pytest.mark.parametrize(
    ("fields", "words", "param"),
    [
        ({"messages": []}, "a conversation must have at least one message", None),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role must be one of", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content", "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "must be a text or a list of parts", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "this server reads text only",
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": "x", "color": 1}]}, "has no field 'color'", "messages[0]"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "must be the JSON text of an object",
            "messages[0].tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "reasoning_content": {}}]},
            "reasoning_content must be a text",
            "messages[0].reasoning_content",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "must be a list", "messages[0].tool_calls"),
        ({"functions": []}, "use tools", "functions"),
        ({"audio": {}}, "reads and writes text", "audio"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "logprobs must be", "logprobs"),
        ({"max_completion_tokens": 4}, "mean the same", "max_tokens"),
        ({"tool_choice": "required"}, "tool_choice needs tools", "tool_choice"),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "names 'g', and the tools are f",
            "tool_choice",
        ),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema", "response_format.json_schema"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "ask for different forms",
            None,
        ),
        ({"reasoning_effort": "high"}, "knows no effort", "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": []}}, "must not have messages", "messages"),
        ({"store": True}, "keeps no conversations", "store"),
    ],
)
def test_chats_that_are_refused(client, fields, words, param):
    refused(client.post("/v1/chat/completions", json=CHAT | fields), 400, words, param)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"store": True}, "keeps no responses"),
        ({"previous_response_id": "resp_1"}, "send the whole conversation"),
        ({"include": ["x"]}, "there is no more to include"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "type must be message"),
        ({"tools": [{"type": "web_search"}]}, "invalid enum value"),
    ],
)
def test_responses_that_are_refused(client, fields, words):
    refused(client.post("/v1/responses", json={"input": "hi"} | fields), 400, words)


def test_bodies_that_are_no_json(client):
    json_type = {"content-type": "application/json"}
    for body in (b"", b"{", b"[" * 100_0, b"\xff\xfe", b'{"prompt": NaN}', b"[]", b"null"):
        refused(client.post("/v1/completions", content=body, headers=json_type), 400, "")
    refused(client.post("/v1/completions", content=b"prompt=x"), 415, "content-type: application/json")
    refused(client.post("/v1/completions", json={"prompt": "x" * 30_000}), 413, "more than 20000 bytes")


def test_paths_and_methods_that_there_are_not(client):
    refused(client.get("/v1/embeddings"), 404, "/openapi.json lists what there is")
    refused(client.get("/v1/completions"), 405, "GET /v1/completions")
    refused(client.get("/page/..%2fapp.py"), 404, "there is no")
    assert client.get("/").headers["content-security-policy"].startswith("default-src 'none'")


def test_a_key_is_needed_but_for_probes_and_the_page(client):
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic second-key"}):
        anonymous = httpx.Client(base_url=client.base_url, headers=given, timeout=PATIENCE)
        refused(anonymous.get("/v1/models"), 401, "Authorization: Bearer KEY")
        refused(anonymous.get("/metrics"), 401, "Authorization: Bearer KEY")
        assert anonymous.get("/health").status_code == anonymous.get("/").status_code == 200
        anonymous.close()
    assert client.get("/v1/models", headers={"authorization": "Bearer first-key"}).status_code == 200


def test_another_host_name_is_refused(client):
    """A page on the web whose name was made to lead here."""
    refused(client.get("/health", headers={"host": "example.com:8000"}), 421, "--allowed-host example.com")


def test_no_other_page_may_read_answers(client):
    response = client.post("/v1/completions", json=TEXT, headers={"origin": "https://example.com"})
    assert "access-control-allow-origin" not in response.headers


def test_adapters_are_loaded_from_under_the_root_only(client):
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    assert client.post(load, json={"lora_name": "sql", "lora_path": "sql"}).json() == {"loaded": "sql"}
    assert client.post("/v1/completions", json=TEXT | {"model": "sql"}).status_code == 200
    refused(client.post(load, json={"lora_name": "sql", "lora_path": "sql"}), 400, "is loaded already")
    refused(client.post(load, json={"lora_name": "tiny", "lora_path": "sql"}), 400, "the name of the model itself")
    for path in ("../out", "/etc", "nowhere", "sql/../../out"):
        refused(client.post(load, json={"lora_name": "x", "lora_path": path}), 404, "under the adapter root")
    assert client.post(unload, json={"lora_name": "sql"}).json() == {"unloaded": "sql"}
    refused(client.post(unload, json={"lora_name": "sql"}), 404, "there is no adapter 'sql'")
    refused(client.post("/v1/completions", json=TEXT | {"model": "sql"}), 404, "there is no model 'sql'")


def test_unknown_fields_are_left_out_if_the_server_says_so(model):
    with serving(new_engine(model), ignore_unknown=True, origins=["https://example.com"]) as served:
        with httpx.Client(base_url=served.url, timeout=PATIENCE) as client:
            answer = client.post(
                "/v1/completions", json=TEXT | {"tempreature": 1}, headers={"origin": "https://example.com"}
            )
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "https://example.com"
            refused(
                client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"}), 403, "--adapter-root"
            )


def test_a_taken_port_is_one_sentence():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}.*choose another --port"):
            bind("127.0.0.1", port)


def test_errors_are_json_that_openai_reads(client):
    body = client.post("/v1/completions", json=TEXT | {"n": 0}).content
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_the_model_and_an_adapter_have_different_names(model):
    runner = Runner(new_engine(model), max_num_seqs=4, max_waiting=1, timeout=1)
    with pytest.raises(ValueError, match="'pirate' is the name of the model and of an adapter"):
        Server(runner, Settings(names=["pirate"]), Metrics("pirate"))
