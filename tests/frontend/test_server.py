"""What the frontend asks a server besides generating: facts, cache, errors."""

from __future__ import annotations

import base64
import warnings
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl

from tests.frontend.world import DOCUMENT, FIRST, LONG, answer, plain, post, refusal

pytestmark = pytest.mark.slow

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def test_the_model_is_named(endpoint: Any) -> None:
    assert Path(endpoint.get_model_name()).name == "checkpoint"
    assert endpoint.model_info["is_generation"] is True


def test_server_info_counts(endpoint: Any) -> None:
    before = endpoint.get_server_info()
    answer()
    after = sgl.get_server_info()
    assert after["sparse_method"] == "losa"
    assert after["internal_states"][0]["generated_tokens"] > before["internal_states"][0]["generated_tokens"]
    assert after["internal_states"][0]["running"] == 0


def test_flush_cache(endpoint: Any) -> None:
    answer()
    assert answer()[1]["cached_tokens"] > 560
    sgl.flush_cache()
    assert answer()[1]["cached_tokens"] == 0


def test_the_servers_sparse_method_is_the_default(url: str) -> None:
    _, meta = answer()
    assert 0 < meta["kv_density"] < 1
    dense = {"temperature": 0, "max_new_tokens": 16, "custom_params": {"sparse_method": "dense"}}
    reply = post(url, "/generate", {"text": plain(FIRST), "sampling_params": dense})
    assert (reply["text"].strip(), reply["meta_info"]["kv_density"]) == (FIRST.answer, 1.0)


def test_a_prompt_that_is_too_long() -> None:
    assert "max_new_tokens" in refusal(max_tokens=10**6)

    @sgl.function
    def program(s: Any) -> None:
        s += LONG.text * 12 + sgl.gen("answer", max_tokens=8)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = program.run().error()
    assert "text" in str(error)
    assert "context" in str(error)


def test_after_an_error_there_is_no_answer_and_no_harm() -> None:
    @sgl.function
    def program(s: Any, heat: float) -> None:
        s += plain(FIRST) + sgl.gen("answer", max_tokens=8, temperature=heat)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failed = program.run(-1.0)
        with pytest.raises(KeyError):
            failed["answer"]
        assert "temperature" in str(failed.error())
    assert program.run(0.0)["answer"].strip() == FIRST.answer


def test_an_error_while_streaming_ends_the_stream() -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += plain(FIRST) + sgl.gen("answer", max_tokens=10**6)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = program.run(stream=True)
        assert "".join(state.text_iter()) == plain(FIRST)
        assert state.error() is not None


def test_pictures_are_refused(tmp_path: Path) -> None:
    picture = tmp_path / "pixel.png"
    picture.write_bytes(base64.b64decode(PIXEL))

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.user(sgl.image(str(picture)) + DOCUMENT.text)
        s += sgl.assistant(sgl.gen("answer", max_tokens=8))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = program.run().error()
    assert "image_data" in str(error)


def test_no_server_is_said_at_once() -> None:
    with pytest.raises(Exception, match="refused"):
        sgl.RuntimeEndpoint("http://127.0.0.1:9")
