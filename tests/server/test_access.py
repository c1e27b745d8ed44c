"""Who may come in: keys and what they allow, tenants that share nothing, browsers that serve other masters."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from losa_runtime.core.errors import ConfigError
from losa_server import keys as keys_module
from losa_server.http.app import create_app
from losa_server.http.guard import ADMIN, OPEN
from losa_server.keys import Keyring
from losa_server.settings import ServerSettings
from losa_server.visit import Caller
from tests.server.app_server import AppServer

FILE = """
# tenants
ann:key-of-ann
bob:key-of-bob:shared
cyd:key-of-cyd:shared
ann:second-key-of-ann
"""


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(bundled: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    """A server with tenants, a plain key and an admin key."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(FILE)
    with AppServer(bundled, api_key="plain", admin_api_key="rootkey-7", api_key_file=file) as running:
        yield running


@pytest.fixture
def call(guarded: AppServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=20) as client:
        yield client


def every_route(server: AppServer) -> list[tuple[str, str]]:
    """(method, path) of all that the application answers, the description of the API included."""

    def walk(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
        for route in routes:
            inner = getattr(route, "original_router", route)  # an included router
            yield from walk(getattr(inner, "routes", ()))
            yield from ((method, route.path) for method in sorted(getattr(route, "methods", None) or ()))

    found = list(walk(create_app(server.manager).routes))
    assert len(found) >= 25
    assert {path for _, path in found} >= {"/generate", "/v1/models", "/openapi.json", *ADMIN, *OPEN}
    return found


def test_every_route_needs_a_key_but_the_probes(guarded: AppServer, call: httpx.Client) -> None:
    for method, path in every_route(guarded):
        for headers in ({}, bearer("wrong"), bearer("-"), {"Authorization": "plain"}, {"Authorization": "Basic plain"}):
            reply = call.request(method, path.replace("{name:path}", "x"), headers=headers)
            assert (reply.status_code == 401) is (path not in OPEN), (method, path, reply.status_code)
            if reply.status_code == 401 and method != "HEAD":
                assert reply.json()["error"]["type"] == "authentication_error"
                assert reply.headers["www-authenticate"] == "Bearer"
    for path in ("/nowhere", "/health/", "//health", "/health/../generate", "/%2e%2e/flush_cache", "/HEALTH"):
        assert call.get(path).status_code == 401, path


def test_what_is_open_is_what_is_listed() -> None:
    assert {"/health", "/ready", "/ping"} == OPEN


def test_admin_routes_need_the_admin_key(guarded: AppServer, call: httpx.Client) -> None:
    for method, path in every_route(guarded):
        if path in ADMIN:
            assert call.request(method, path, headers=bearer("plain")).status_code == 403
            assert call.request(method, path, headers=bearer("key-of-ann")).status_code == 403
            assert call.request(method, path, headers=bearer("rootkey-7")).status_code not in (401, 403)
    assert call.request("GET", "/%66lush_cache", headers=bearer("plain")).status_code == 403
    assert call.post("/abort_request", json={"abort_all": True}, headers=bearer("plain")).status_code == 403
    assert call.post("/abort_request", json={"abort_all": True}, headers=bearer("rootkey-7")).status_code == 200


def test_keys_stay_out_of_what_the_server_tells(call: httpx.Client) -> None:
    info = call.get("/server_info", headers=bearer("rootkey-7"))
    assert info.json()["admin_api_key"] == "**********"
    assert "rootkey-7" not in info.text
    assert "rootkey-7" not in repr(ServerSettings(admin_api_key=SecretStr("rootkey-7")))


def generate(call: httpx.Client, key: str, **body: Any) -> Any:
    body = {"text": "the fox", "sampling_params": {"max_new_tokens": 1}, **body}
    reply = call.post("/generate", json=body, headers=bearer(key))
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_tenants_have_prefix_caches_of_their_own(guarded: AppServer, call: httpx.Client) -> None:
    def namespace(key: str, **body: Any) -> str:
        generate(call, key, **body)
        return guarded.engine.seen[-1].namespace

    assert namespace("plain") == namespace("rootkey-7") == ""
    assert namespace("key-of-ann") == namespace("second-key-of-ann")
    assert namespace("key-of-bob") == namespace("key-of-cyd")
    names = {namespace(key) for key in ("plain", "key-of-ann", "key-of-bob")}
    names |= {namespace(key, cache_salt="s") for key in ("plain", "key-of-ann", "key-of-bob")}
    assert len(names) == 6
    # Nobody talks himself into another one's.
    ann = namespace("key-of-ann")
    forged = [{"extra_key": "ann"}, {"cache_salt": ann}, {"extra_key": ann}, {"extra_key": "ann", "cache_salt": ":"}]
    assert all(namespace("plain", **body) != ann for body in forged)
    assert all(namespace("key-of-bob", **body) != ann for body in forged)


def test_nobody_aborts_another_ones_requests(guarded: AppServer, call: httpx.Client) -> None:
    replies: dict[str, Any] = {}

    def ask(key: str) -> None:
        body = {"text": "HANG", "rid": "same"}
        replies[key] = httpx.post(f"{guarded.url}/generate", json=body, headers=bearer(key), timeout=20).json()

    threads = [threading.Thread(target=ask, args=(key,)) for key in ("key-of-ann", "key-of-bob")]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(guarded.engine.live) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    abort = {"rid": "same"}
    assert call.post("/abort_request", json=abort, headers=bearer("plain")).json() == {"aborted": 0}
    assert call.post("/abort_request", json=abort, headers=bearer("second-key-of-ann")).json() == {"aborted": 1}
    threads[0].join(10)
    assert set(replies) == {"key-of-ann"}
    assert call.post("/abort_request", json=abort, headers=bearer("rootkey-7")).json() == {"aborted": 1}
    threads[1].join(10)
    assert replies["key-of-bob"]["meta_info"]["finish_reason"]["type"] == "abort"


def test_all_keys_are_compared_whatever_is_presented(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(len(a))
        return hmac.compare_digest(a, b)

    ring = Keyring.of(ServerSettings(api_key=SecretStr("one"), admin_api_key=SecretStr("two")))
    monkeypatch.setattr(keys_module, "hmac", type("Counting", (), {"compare_digest": staticmethod(counting)}))
    assert [ring.caller(key) for key in ("one", "two", "three", None)] == [
        Caller("user", admin=False), Caller("admin"), None, None
    ]  # fmt: skip
    assert compared == [32] * 8


def test_a_sole_key_may_manage() -> None:
    caller = Keyring.of(ServerSettings(api_key=SecretStr("one"))).caller("one")
    assert caller is not None
    assert caller.admin
    both = Keyring.of(ServerSettings(api_key=SecretStr("one"), admin_api_key=SecretStr("two")))
    assert both.caller("one") == Caller("user", admin=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key": ""},
        {"api_key": "with space"},
        {"api_key": "with:colon"},
        {"api_key": "ümlaut"},
        {"admin_api_key": "x" * 513},
        {"api_key": "twice-7", "admin_api_key": "twice-7"},
    ],
)
def test_unusable_keys_are_refused_without_showing_them(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Keyring.of(ServerSettings(**{name: SecretStr(key) for name, key in settings.items()}))  # type: ignore[arg-type]
    assert next(iter(settings)) in str(caught.value)
    assert not any(len(key) > 3 and key in str(caught.value) for key in settings.values())


@pytest.mark.parametrize("text", ["", "# nothing\n", "nocolon\n", ":key\n", "a:\n", "a b:key\n", "a:k:" + "s" * 257])
def test_unusable_key_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match="api_key_file"):
        Keyring.of(ServerSettings(api_key_file=file))
    with pytest.raises(ConfigError, match="cannot be read"):
        Keyring.of(ServerSettings(api_key_file=tmp_path / "none"))


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.1.2.3", False), ("x.y", False)],
)
def test_without_keys_only_this_machine_may_manage(host: str, local: bool) -> None:
    caller = Keyring.of(ServerSettings(host=host)).caller(None)
    assert caller is not None
    assert caller.admin is local


# --- browsers --------------------------------------------------------------------------------------------------------

HOST = "127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "anything.example"}, 200),  # no browser
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://localhost:{port}", "Host": "localhost:{port}"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Host": "localhost:{port}"}, 403),
        # A name of theirs that was made to point here.
        ({"Origin": "http://evil.example:{port}", "Host": "evil.example:{port}"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Host": "evil.example:{port}"}, 403),
        ({"Origin": "https://lab.example"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_other_sites_get_nothing(
    http: httpx.Client, server: AppServer, headers: dict[str, str], status: int, method: str
) -> None:
    port = server.url.rpartition(":")[2]
    headers = {name: value.replace("{port}", port) for name, value in headers.items()}
    reply = http.request(method, "/flush_cache", headers=headers)
    assert reply.status_code == status
    assert "access-control-allow-origin" not in reply.headers
    if status == 403:
        assert reply.json()["error"]["type"] == "permission_error"


def test_preflights_are_not_answered_by_default(http: httpx.Client) -> None:
    headers = {"Origin": "https://lab.example", "Access-Control-Request-Method": "POST"}
    reply = http.options("/generate", headers=headers)
    assert reply.status_code == 403
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_pages_of_chosen_sites_may_come_in(bundled: str) -> None:
    lab = "https://lab.example"
    with AppServer(bundled, allowed_origins=(lab,)) as server, httpx.Client(base_url=server.url) as http:
        headers = {"Origin": lab, "Access-Control-Request-Method": "POST"}
        assert http.options("/generate", headers=headers).status_code == 200
        reply = http.get("/v1/models", headers={"Origin": lab, "Sec-Fetch-Site": "cross-site"})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, lab)
        assert "access-control-allow-credentials" not in reply.headers
        assert http.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
