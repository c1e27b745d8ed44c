"""What a person sees at start: a table of what was loaded, and how to reach it. Knows no engine, only its facts."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show_start(console: Console, info: dict[str, Any], seconds: float) -> None:
    """Print the start-up table. info: `Engine.info`; facts that it lacks are left out."""
    table = Table(title=f"losa-runtime {info.get('version', '')}: loaded in {seconds:.1f} s", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _rows(info):
        table.add_row(name, text)
    console.print(table)


def show_ready(console: Console, url: str) -> None:
    """Print where the server is, with a request to try at once."""
    console.print(f"\n[bold green]ready[/] on [bold]{url}[/]\n")
    lines = (
        f"curl -s {url}/generate -H 'Content-Type: application/json' \\",
        '     -d \'{"text": "Once", "sampling_params": {"max_new_tokens": 32, "temperature": 0}}\'',
        "",
        "import sglang as sgl",
        f'sgl.set_default_backend(sgl.RuntimeEndpoint("{url}"))',
        'ask = sgl.function(lambda s, q: s + q + sgl.gen("answer", max_tokens=32))',
        'print(ask.run("Once")["answer"])',
    )
    for line in lines:
        console.print("  " + line, markup=False, highlight=False, soft_wrap=True)
    console.print()


def _rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    pool = _join(
        ("{:,} tokens", info.get("max_total_tokens")),
        ("pages of {}", info.get("page_size")),
        ("{:.1f} MiB", _mib(info.get("kv_pool_bytes"))),
        ("{}", info.get("kv_cache_dtype")),
    )
    model = _join(
        ("{}", info.get("architecture")),
        ("{:.1f} M parameters", _millions(info.get("parameters"))),
        ("{}", info.get("dtype")),
    )
    sequence = _join(("context {:,}", info.get("context_length")), ("blocks of {}", info.get("block_length")))
    sparse = _join(("{}", info.get("sparse_method")), ("budget {} tokens", info.get("token_budget")))
    if info.get("sparse_method") == "dense":
        sparse = "dense (a request may choose another in custom_params)"
    decoding = _join(("{}", info.get("algorithm")), ("threshold {}", info.get("threshold")))
    batching = _join(
        ("{} running", info.get("max_running_requests")),
        ("{} prompt tokens per round", info.get("chunked_prefill_size")),
        ("prefix cache {}", "on" if info.get("radix_cache") else "off"),
    )
    device = _join(("{}", info.get("device")), ("{}", info.get("attention_backend")))
    rows = [
        ("checkpoint", str(info.get("model_path", ""))),
        ("model", model),
        ("sequence", sequence),
        ("device", device),
        ("page pool", pool),
        ("batching", batching),
        ("attention", sparse),
        ("decoding", decoding),
    ]
    return [(name, text) for name, text in rows if text]


def _join(*parts: tuple[str, Any]) -> str:
    return ", ".join(form.format(value) for form, value in parts if value is not None)


def _mib(size: Any) -> float | None:
    return size / 2**20 if isinstance(size, int) else None


def _millions(count: Any) -> float | None:
    return count / 1e6 if isinstance(count, int) else None
