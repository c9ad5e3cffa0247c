"""The server as an operator shows it to the world: HTTPS, a prefix, names, another tokenizer."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest

from server.cli.launch import check_certificate, run_server
from server.settings import Settings
from skipllm_core.errors import ConfigError
from tests.e2e.serving import serve

PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for this machine that signs itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_a_certificate_that_cannot_be_used_is_one_line(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = certificate
    check_certificate(None, None)
    check_certificate(cert, key)
    (tmp_path / "no.pem").write_text("not a certificate")
    for cert_file, key_file in [
        (tmp_path / "absent.pem", None),
        (tmp_path / "no.pem", key),
        (cert, tmp_path / "no.pem"),
        (cert, None),  # the key is not in it
    ]:
        with pytest.raises(ConfigError, match="cannot serve HTTPS with ") as caught:
            check_certificate(cert_file, key_file)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot serve HTTPS"):
        run_server(Settings(ssl_certfile=tmp_path / "absent.pem", port=0))


@pytest.mark.slow
def test_all_of_it_at_once(
    dummy_model: Path, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = certificate
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(dummy_model, tokenizer)
    (tokenizer / "config.json").unlink()
    template = {"chat_template": "{% for m in messages %}<{{ m.content }}>{% endfor %}"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(template))
    (tokenizer / "generation_config.json").write_text('{"temperature": 0}')
    args = (
        str(dummy_model), "--load-format", "dummy", "--num-threads", "1",
        "--ssl-certfile", str(cert), "--ssl-keyfile", str(key),
        "--served-model-name", "first,second", "--root-path", "/llm",
        "--allowed-origins", PAGE, "--tokenizer", str(tokenizer),
        "--generation-config", str(tokenizer),
    )  # fmt: skip
    context = ssl.create_default_context(cafile=str(cert))
    with serve(tmp_path / "log", *args, wait=False) as served:
        url = served.url.replace("http://", "https://") + "/llm"
        with httpx.Client(base_url=url, verify=context) as http:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    if http.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    assert served.process.poll() is None, served.log
                time.sleep(0.1)
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", http_client=http)
            assert [card.id for card in client.models.list()] == ["first", "second"]
            answer = client.chat.completions.create(
                model="second",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=3,
                extra_body={"return_token_ids": True},
            )
            assert answer.model == "first"
            ids = (http.post("/tokenize", json={"prompt": "<hi>"})).json()["tokens"]
            assert answer.model_extra is not None
            assert answer.model_extra["prompt_token_ids"] == ids, "the other template"
            held = client.completions.create(
                model="first", prompt="a", extra_body={"guided_choice": ["yes", "no"]}
            )
            assert held.choices[0].text in ("yes", "no"), "of the other tokenizer's texts"
            assert held.choices[0].finish_reason == "stop"
            defaults = http.get("/server_info").json()["sampling_defaults"]
            assert defaults["temperature"] == 0
            reply = http.get("/v1/nowhere", headers={"origin": PAGE})
            assert reply.status_code == 404
            assert reply.headers["access-control-allow-origin"] == PAGE
        with pytest.raises(httpx.TransportError):
            httpx.get(served.url + "/live", timeout=5)  # no plain HTTP there
        assert f"address   {url.removesuffix('/llm')}" in served.log
        assert served.process.poll() is None
        assert "Traceback" not in served.log
