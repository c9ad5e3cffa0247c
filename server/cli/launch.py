"""`skipllm serve`, from settings to exit code: listen, load, tell, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import orjson
import uvicorn
import uvloop
from prometheus_client import disable_created_metrics
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.app import build_app
from server.cli.banner import describe_skipping, print_banner, print_line
from server.cli.models import find_model, find_sampling_defaults, find_tokenizer
from server.cors import CrossOrigin
from server.errors import ErrorReply
from server.lifecycle import Lifecycle
from server.logs import configure_logging
from server.metrics import Metrics
from server.settings import Settings
from server.tools.style import ChatStyle
from skipllm_core.client import ProcessEngineClient
from skipllm_core.config import EngineConfig
from skipllm_core.errors import ConfigError, InvalidRequestError
from skipllm_core.model.config import load_model_config
from skipllm_core.model.fingerprint import model_fingerprint
from skipllm_core.model.gguf.directory import is_directory_of_gguf
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import SkipDefaults
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import EngineInfo

PROFILE_NAME = "skip.yaml"  # a model's own profile, in its directory
PROFILES_DIR = Path(__file__).parents[2] / "configs" / "skip"  # those that come with the package
KEEP_ALIVE_S = 75  # longer than the idle time of usual proxies: the proxy closes, not we
FAREWELL_S = 0.5  # for telling what outlasts the drain that it is over
FLUSH_S = 1  # for responses that are still being written when all has ended

logger = logging.getLogger(__name__)


def run_server(settings: Settings) -> int:
    """Serves until told to stop; returns the exit code. Raises ConfigError where it cannot."""
    configure_logging(settings.log_level)
    signal.signal(signal.SIGTERM, _end_at_once)  # while a model is fetched; `_Stop` takes over
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, unused
    check_certificate(settings.ssl_certfile, settings.ssl_keyfile)
    with listen(settings.host, settings.port) as listener:  # a taken port is told before the load
        print_line(f"loading {settings.model_name} ...")
        model_dir = find_model(settings)
        load_model_config(model_dir)  # an unsupported model is told before anything else of it
        profile = find_profile(settings.skip_profile, model_dir)
        tokenizer_dir = find_tokenizer(settings, model_dir)
        config = settings.engine_config(model_dir, tokenizer_dir)
        tokenizer = HFTokenizer(
            tokenizer_dir, eos_from=model_dir, chat_template=settings.chat_template
        )
        return uvloop.run(_serve(settings, config, tokenizer, profile, listener))


def _end_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    """Nothing is being served yet. The default would do, but not in a container's first process,
    which ignores it; and an exception would wait for the threads of a download."""
    os._exit(128 + number)


def find_profile(given: Path | None, model_dir: Path) -> SkipProfile | None:
    """The skip profile of a model, if there is one.

    Raises ProfileError when it cannot be read, or is another model's.
    """
    fingerprint = model_fingerprint(model_dir)
    path = find_profile_file(given, model_dir, fingerprint)
    if path is None:
        return None
    profile = SkipProfile.load(path)
    profile.check_model(fingerprint)
    return profile


def find_profile_file(given: Path | None, model_dir: Path, fingerprint: str) -> Path | None:
    """The one that was named, else the model's own, else ours of the same weights: a profile there
    bears the beginning of their fingerprint in its name, so that no other has to be read.

    In a folder of several GGUF files the profile is one file's; it is none of the others'.
    """
    if given is not None:
        return given
    own = model_dir / PROFILE_NAME
    if own.exists():
        if not is_directory_of_gguf(model_dir) or fingerprint in own.read_text(errors="replace"):
            return own
        logger.warning("%s is of another model, and is not used", own.resolve())
    return next(PROFILES_DIR.glob(f"*.{fingerprint[:12]}.yaml"), None)


def check_certificate(certfile: Path | None, keyfile: Path | None) -> None:
    """Raises ConfigError for a certificate that cannot be served with."""
    if certfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certfile, keyfile, password=lambda: b"")  # never asks the terminal
    except OSError as error:  # ssl's own among them
        reason = error.strerror or str(error)
        files = certfile if keyfile is None else f"{certfile} with {keyfile}"
        raise ConfigError(f"cannot serve HTTPS with {files}: {reason}") from None


def _cross_origin(settings: Settings) -> CrossOrigin | None:
    if not settings.allowed_origins:
        return None
    return CrossOrigin(
        origins=settings.allowed_origins,
        methods=settings.allowed_methods,
        headers=settings.allowed_headers,
        credentials=settings.allow_credentials,
    )


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]  # asyncio's, without the address
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None
    with listener:
        yield listener


async def _serve(
    settings: Settings,
    config: EngineConfig,
    tokenizer: HFTokenizer,
    profile: SkipProfile | None,
    listener: socket.socket,
) -> int:
    started_s = time.monotonic()
    skip_defaults = settings.skip_defaults(profile)
    stop = _Stop(settings.shutdown_timeout)
    engine = ProcessEngineClient(config, on_fatal=stop.on_fatal)
    metrics = Metrics(settings.model_name)
    metrics.watch(engine)
    app = build_app(
        engine,
        tokenizer,
        model_name=settings.model_name,
        model_aliases=settings.model_aliases,
        metrics=metrics,
        chat_style=ChatStyle.of(
            tokenizer,
            parser=settings.tool_call_parser,
            reasoning_parser=settings.reasoning_parser,
        ),
        skip_defaults=skip_defaults,
        skip_profile=profile,
        api_keys=settings.api_key,
        sampling_defaults=find_sampling_defaults(settings, config.model_dir),
        strict_params=settings.strict_params,
        cross_origin=_cross_origin(settings),
        root_path=settings.root_path or "",
        responses_store_size=settings.responses_store_size,
        responses_store_memory=settings.responses_store_memory,
    )
    http = _HTTPServer(
        uvicorn.Config(
            app,
            http=HTTPProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FLUSH_S,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
    )
    stop.watch(http, app.state.lifecycle)
    serving = asyncio.create_task(http.serve([listener]))  # /live and /ready answer while it loads
    loading = asyncio.create_task(engine.start())
    try:
        await asyncio.wait({loading, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()  # raises ConfigError
            metrics.set_shape(engine.info)
            skipping = _describe_skipping(skip_defaults, profile, engine.info)
            print_banner(
                settings,
                engine.info,
                skipping,
                url=_url(settings, listener),
                startup_s=time.monotonic() - started_s,
            )
            if profile is None:
                print_line(
                    "This model has no skip profile, so nothing is skipped. To make one: "
                    f"skipllm calibrate {settings.model or config.model_dir} "
                    "--prompts PROMPTS.jsonl --out skip.yaml; then serve with "
                    "--skip-profile skip.yaml"
                )
        await serving
    finally:
        http.should_exit = True
        loading.cancel()
        await asyncio.wait({loading, serving})
        await engine.close()
    return stop.exit_code


def _describe_skipping(
    defaults: SkipDefaults, profile: SkipProfile | None, info: EngineInfo
) -> list[str]:
    """Raises ConfigError where the engine, now that it is known, cannot skip so."""
    try:
        return describe_skipping(defaults, profile, info.skip_policies)
    except InvalidRequestError as error:
        raise ConfigError(str(error)) from None


class HTTPProtocol(HttpToolsProtocol):
    """Refuses what is no HTTP, and so reaches no application, in the form of all other errors."""

    def send_400_response(self, msg: str) -> None:
        content = orjson.dumps(ErrorReply(400, msg).body)
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nx-request-id: {uuid.uuid4().hex}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()


class _HTTPServer(uvicorn.Server):
    """Leaves signals to `_Stop`: uvicorn would stop accepting at once, and /ready would be mute."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stop:
    """Why and how the server ends. The first signal drains, the second ends at once."""

    def __init__(self, drain_timeout_s: float) -> None:
        self.exit_code = 0
        self._drain_timeout_s = drain_timeout_s
        self._draining: asyncio.Task[None] | None = None

    def watch(self, http: uvicorn.Server, lifecycle: Lifecycle) -> None:
        self._http = http
        self._lifecycle = lifecycle
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def on_fatal(self, reason: str) -> None:
        """The engine has given up, so there is nothing left to serve."""
        logger.error("the engine is gone for good: %s", reason)
        self.exit_code = 1
        self._http.should_exit = True

    def _on_signal(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain(self._drain_timeout_s))
        else:
            self._draining.cancel()
            self._draining = asyncio.create_task(self._drain(0))

    async def _drain(self, timeout_s: float) -> None:
        self._lifecycle.begin_drain()
        if timeout_s and (num_running := self._lifecycle.num_running):
            print_line(
                f"stopping: {num_running} running, {timeout_s:g} s to end "
                "(a second signal stops at once)"
            )
        await self._lifecycle.wait_drained(timeout_s, farewell_s=FAREWELL_S)
        self._http.should_exit = True


def _url(settings: Settings, listener: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    port = listener.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    scheme = "http" if settings.ssl_certfile is None else "https"
    return f"{scheme}://[{name}]:{port}" if ":" in name else f"{scheme}://{name}:{port}"
