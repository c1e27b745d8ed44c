"""What a person sees at start: a table of what was loaded, and how to reach it. Knows no engine, only its facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MIB = 2**20
Facts = Mapping[str, Any]


def show_start(console: Console, info: Facts, seconds: float) -> None:
    """Print the start-up table. info: `Engine.info`; facts that it lacks are left out."""
    table = Table(title=f"losa-runtime {info.get('version', '')}: loaded in {seconds:.1f} s", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _rows(info):
        table.add_row(name, escape(text))
    console.print(table)


def show_ready(console: Console, url: str, *, with_key: bool = False) -> None:
    """Print where the server is, with a request to try at once. with_key: whether requests need one."""
    console.print(f"\n[bold green]ready[/] on [bold]{url}[/]\n")
    key = ' -H "Authorization: Bearer $LOSA_API_KEY"' if with_key else ""
    argument = ', api_key=os.environ["LOSA_API_KEY"]' if with_key else ""
    lines = (
        f"curl -s {url}/generate -H 'Content-Type: application/json'{key} \\",
        '     -d \'{"text": "Once", "sampling_params": {"max_new_tokens": 32, "temperature": 0}}\'',
        "",
        *(["import os"] if with_key else []),
        "import sglang as sgl",
        f'sgl.set_default_backend(sgl.RuntimeEndpoint("{url}"{argument}))',
        'ask = sgl.function(lambda s, q: s + q + sgl.gen("answer", max_tokens=32))',
        'print(ask.run("Once")["answer"])',
    )
    for line in lines:
        console.print("  " + line, markup=False, highlight=False, soft_wrap=True)
    console.print()


def _rows(info: Facts) -> list[tuple[str, str]]:
    rows = [
        ("checkpoint", str(info.get("model_path", ""))),
        ("model", _model(info)),
        ("sequence", _join(info, ("context {:,}", "context_length"), ("blocks of {}", "block_length"))),
        ("device", _device(info)),
        ("page pool", _pool(info)),
        ("batching", _batching(info)),
        ("attention", _sparse(info)),
        ("methods", ", ".join(info.get("sparse_methods", ()))),
        ("decoding", _decoding(info)),
    ]
    return [(name, text) for name, text in rows if text]


def _model(info: Facts) -> str:
    sizes = {
        "millions": info["parameters"] / 1e6 if "parameters" in info else None,
        "mib": info["weight_bytes"] / MIB if "weight_bytes" in info else None,
        "before": info["weight_bytes_unquantized"] / MIB if info.get("quantization") else None,
    }
    forms = (
        ("{}", "architecture"),
        ("{:,.1f} M parameters", "millions"),
        ("{}", "dtype"),
        ("linear layers in {}", "quantization"),
        ("{:,.1f} MiB", "mib"),
        ("unquantized {:,.1f} MiB", "before"),
    )
    return _join({**info, **sizes}, *forms)


def _device(info: Facts) -> str:
    backend = " ".join(str(info[name]) for name in ("attention_backend", "attention_detail") if info.get(name))
    return _join({**info, "backend": backend or None}, ("{}", "device"), ("{}", "backend"), ("threads: {}", "threads"))


def _pool(info: Facts) -> str:
    sizes = {
        "pool": info["kv_pool_bytes"] / MIB if "kv_pool_bytes" in info else None,
        "state": info["sparse_state_bytes"] / MIB if info.get("sparse_state_bytes") else None,
    }
    return _join(
        {**info, **sizes},
        ("{:,} tokens", "max_total_tokens"),
        ("pages of {}", "page_size"),
        ("{}", "kv_cache_dtype"),
        ("{:,.1f} MiB", "pool"),
        ("and {:,.1f} MiB for the states of methods", "state"),
    )


def _batching(info: Facts) -> str:
    cache = None if "radix_cache" not in info else "on" if info["radix_cache"] else "off"
    return _join(
        {**info, "cache": cache},
        ("{} running", "max_running_requests"),
        ("{:,} waiting", "max_queued_requests"),
        ("{:,} prompt tokens per round", "chunked_prefill_size"),
        ("{}", "schedule_policy"),
        ("prefix cache {}", "cache"),
    )


def _sparse(info: Facts) -> str:
    if info.get("sparse_method") == "dense":
        return "dense (a request may choose another in custom_params)"
    text = _join(info, ("{}", "sparse_method"), ("budget {} tokens", "token_budget"))
    return text if info.get("sparse_min_context") in (None, 0) else f"{text}, {_least_prefix(info)}"


def _least_prefix(info: Facts) -> str:
    """From which prefix on the method is used, where that is not always."""
    least = (info.get("sparse_from") or {}).get(info["sparse_method"])
    why = " (measured)" if info["sparse_min_context"] == "auto" else ""
    if least is None:
        return f"but dense up to the longest context{why}"
    return f"dense below {least:,} tokens of context{why}"


def _decoding(info: Facts) -> str:
    forms = (
        ("threshold {}", "threshold"),
        ("edits above {}", "edit_threshold"),
        ("up to {} nats at once", "entropy_bound"),
        ("{} planned steps per block", "denoising_steps"),
        ("sub-blocks of {}", "sub_block_length"),
    )
    read = [(form, name) for form, name in forms if name in info.get("algorithm_reads", ())]
    return _join(info, ("{}", "algorithm"), *read)


def _join(info: Facts, *forms: tuple[str, str]) -> str:
    return ", ".join(form.format(info[name]) for form, name in forms if info.get(name) is not None)
