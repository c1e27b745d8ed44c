"""Flags, LOSA_… variables and a YAML file become the settings models; the nearest to the person wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, SecretStr

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError
from losa_runtime.core.options import option
from losa_server.bench.settings import BenchSettings
from losa_server.cli import make_parser
from losa_server.configuration.flags import ALL_MODELS, settings_from
from losa_server.configuration.options import options_of
from losa_server.configuration.printout import as_yaml
from losa_server.configuration.sources import Configuration, read_configuration
from losa_server.settings import ClientSettings, ServerSettings

SERVE: tuple[type[BaseModel], ...] = (ServerSettings, EngineConfig)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("LOSA_")]:
        monkeypatch.delenv(name)


def configuration(*words: str) -> Configuration:
    return settings_from(make_parser()[0].parse_args(["serve", *words]), ServerSettings, EngineConfig)


def engine(*words: str) -> EngineConfig:
    return configuration("--model-path", "m", *words).make(EngineConfig)


def read(
    models: Sequence[type[BaseModel]] = ALL_MODELS, file: Path | None = None, **variables: str
) -> Mapping[str, Any]:
    options = options_of(*models)
    given = read_configuration(options, options, {}, variables, file).given
    return {field: value for field, (value, _) in given.items()}


def test_absent_options_keep_the_defaults() -> None:
    assert engine() == EngineConfig(model="m")
    assert configuration("--model", "m").make(ServerSettings) == ServerSettings()


OPTIONS = """
--tokenizer-path t --dtype bfloat16 --kv-cache-dtype float16 --context-length 512 --mem-fraction-static 0.3
--max-running-requests 4 --max-total-tokens 4096 --page-size 32 --chunked-prefill-size 64 --random-seed 7
--disable-radix-cache --attention-backend torch --device cpu --sparse-method losa --token-budget 256
--active-ratio 0.5 --dllm-algorithm low_confidence_static --threshold 0.8 --denoising-steps 4 --block-length 8
--mask-token-id 3 --max-queued-requests 9 --schedule-policy lpm --radix-eviction-policy lfu
--sparse-methods losa,dense --sparse-options {"dense_layers":2} --quantization int8
--rope-scaling {"rope_type":"yarn","factor":2.0}
"""


def test_every_option_arrives() -> None:
    assert engine(*OPTIONS.split()) == EngineConfig.parse(
        model="m", tokenizer="t", dtype="bfloat16", kv_cache_dtype="float16", context_length=512,
        mem_fraction_static=0.3, max_running_requests=4, max_total_tokens=4096, page_size=32, chunked_prefill_size=64,
        random_seed=7, disable_radix_cache=True, attention_backend="torch", device="cpu", sparse_method="losa",
        token_budget=256, active_ratio=0.5, algorithm="low_confidence_static", threshold=0.8, denoising_steps=4,
        block_length=8, mask_token_id=3, max_queued_requests=9, schedule_policy="lpm", radix_eviction_policy="lfu",
        sparse_methods=("losa", "dense"), sparse_options={"dense_layers": 2},
        rope_scaling={"kind": "yarn", "factor": 2.0}, quantization="int8",
    )  # fmt: skip


def test_every_setting_is_an_option_unless_it_is_nobodys_business() -> None:
    fields = {field for model in ALL_MODELS for field in model.model_fields}
    assert fields - {option.field for option in options_of(*ALL_MODELS)} == {"show_progress", "long_text", "shutdown_s"}


@pytest.mark.parametrize("models", [SERVE, (ClientSettings, BenchSettings, EngineConfig)], ids=["serve", "bench"])
def test_no_name_means_two_things(models: Sequence[type[BaseModel]]) -> None:
    names = [name for option in options_of(*models) for name in option.names]
    assert len(names) == len(set(names))
    # A name that several commands know means the same field everywhere.
    fields = {(name, option.field) for option in options_of(*ALL_MODELS) for name in option.names}
    assert len(fields) == len({name for name, _ in fields})


def test_the_nearest_source_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model-path: from-file\npage_size: 8\nport: 1\ntoken-budget: 64\ndisable_radix_cache: true\n")
    monkeypatch.setenv("LOSA_PAGE_SIZE", "32")
    monkeypatch.setenv("LOSA_PORT", "2")
    found = configuration("--config", str(file), "--port", "3", "--no-disable-radix-cache")
    config = found.make(EngineConfig)
    assert (config.model, config.token_budget, config.page_size) == ("from-file", 64, 32)
    assert config.disable_radix_cache is False
    assert found.make(ServerSettings).port == 3
    assert [found.given[name].origin for name in ("page_size", "port")] == ["LOSA_PAGE_SIZE", "--port"]


def test_the_file_may_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: m\n")
    monkeypatch.setenv("LOSA_CONFIG", str(file))
    assert configuration().make(EngineConfig).model == "m"


def test_kinds_of_values_in_variables_and_files(tmp_path: Path) -> None:
    words = read(
        LOSA_SPARSE_METHODS="dense, losa", LOSA_SPARSE_OPTIONS='{"dense_layers": 1}', LOSA_DETERMINISTIC="true",
        LOSA_MAX_TOTAL_TOKENS="none", LOSA_MEM_FRACTION_STATIC="0.25",
    )  # fmt: skip
    file = tmp_path / "serve.yaml"
    file.write_text(
        "sparse_methods: [dense, losa]\nsparse_options: {dense_layers: 1}\ndeterministic: yes\n"
        "max_total_tokens: null\nmem_fraction_static: 0.25\n"
    )
    assert EngineConfig(model="m", **words) == EngineConfig(model="m", **read(file=file))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("page-sise: 8", "page-sise in {file}: no such setting (did you mean page_size?)"),
        ("max_model_len: 8", "max_model_len in {file}: no such setting (here: --context-length)"),
        ("model: a\nmodel_path: b", "model_path in {file}: the same setting as model in {file}"),
        ("page_size: 8\npage_size: 16", "'page_size' stands there twice"),
        ("- page_size", "holds list, allowed: a mapping"),
        ("a: [", "is not YAML"),
        ("long_text: 5", "long_text in {file}: no such setting"),
        ("sparse_options: '['", "sparse_options in {file}: found '[': not JSON"),
    ],
)
def test_a_wrong_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(file=file)
    assert said.replace("{file}", str(file)) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config: .*nothing.yaml cannot be read: No such file"):
        read(file=tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LOSA_PORTT": "1"}, r"LOSA_PORTT: no such setting \(did you mean LOSA_PORT\?\)"),
        ({"LOSA_MAX_NUM_SEQS": "1"}, r"LOSA_MAX_NUM_SEQS: no such setting \(here: --max-running-requests\)"),
        ({"LOSA_MODEL": "a", "LOSA_MODEL_PATH": "b"}, "LOSA_MODEL_PATH: the same setting as LOSA_MODEL; keep one"),
    ],
)
def test_wrong_variables_are_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(**variables)


def test_variables_of_others_are_left_alone() -> None:
    assert read(LOSA_SIMD="avx2", LOSA_KERNELS="x", PORT="5") == {}


def test_a_wrong_value_is_refused_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: m\nrope_scaling: {kind: yarn, factor: 0.5}\n")
    options = options_of(EngineConfig)
    with pytest.raises(ConfigError, match=r"^rope_scaling in .*serve.yaml.factor: found 0.5: Input should be greater"):
        read_configuration(options, options, {}, {}, file).make(EngineConfig)


def test_settings_of_other_commands_are_known_but_not_taken() -> None:
    options, everything = options_of(EngineConfig), options_of(*ALL_MODELS)
    found = read_configuration(options, everything, {}, {"LOSA_PORT": "5", "LOSA_MODEL": "m"}, None)
    assert set(found.given) == {"model"}


def test_the_printout_can_be_read_back(tmp_path: Path) -> None:
    words = ["--model", "m", "--port", "5", *OPTIONS.split()]
    first = configuration(*words)
    text = as_yaml(first, first.make(ServerSettings), first.make(EngineConfig))
    assert "port: 5  # --port\n" in text
    assert "host: 127.0.0.1\n" in text
    file = tmp_path / "printed.yaml"
    file.write_text(text)
    second = configuration("--config", str(file))
    for model in SERVE:
        assert second.make(model) == first.make(model)
    assert set(yaml.safe_load(text)) == {option.names[0] for option in options_of(*SERVE)}


class Keys(BaseModel):
    api_key: SecretStr | None = option(None, "keys", "who may call")
    level: int = option(1, "keys", "a number", ge=0)


def test_a_secret_is_neither_printed_nor_quoted() -> None:
    options = options_of(Keys)
    found = read_configuration(options, options, {}, {"LOSA_API_KEY": "hush"}, None)
    text = as_yaml(found, found.make(Keys))
    assert "hush" not in text
    assert "# api_key: given, not shown  # LOSA_API_KEY" in text
    assert found.make(Keys).api_key == SecretStr("hush")
    assert yaml.safe_load(text) == {"level": 1}
