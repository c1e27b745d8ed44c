"""The table of workloads. SGLang's programs are looked for only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

from losa_runtime.core.errors import ConfigError
from losa_server.bench.dialogues import ChatWorkload, QuestionsWorkload
from losa_server.bench.prompts import FewShotWorkload, MixedLengthsWorkload, RandomWorkload, SharedPrefixWorkload
from losa_server.bench.settings import BenchSettings
from losa_server.bench.source import Source
from losa_server.bench.workload import Workload


def programs(settings: BenchSettings, source: Source) -> Workload:
    """SGLang's programs. Raises ConfigError where its frontend is not installed, or a setting means nothing to it."""
    if settings.abort_share or settings.request_methods or settings.custom_params:
        raise ConfigError(
            "workload: SGLang's programs know no --abort-share, --request-methods and --custom-params; "
            "choose another workload, or give the server these defaults"
        )
    try:
        from losa_server.bench.programs import ProgramsWorkload
    except ImportError as error:
        raise ConfigError(f"workload: programs needs SGLang's frontend ({error}): losa-runtime[frontend]") from None
    return ProgramsWorkload(settings, source)


WORKLOADS: dict[str, Callable[[BenchSettings, Source], Workload]] = {
    "random": RandomWorkload,
    "shared-prefix": SharedPrefixWorkload,
    "few-shot": FewShotWorkload,
    "questions": QuestionsWorkload,
    "chat": ChatWorkload,
    "mixed-lengths": MixedLengthsWorkload,
    "programs": programs,
}
