"""The planted bugs: what is changed in which file, and the test that must fail then.

Each `old` stands exactly once in its file; a fast test keeps it so. Whoever changes such a line changes it here, too.
"""

from __future__ import annotations

from typing import NamedTuple

CACHE, SCHEDULER, SERVER = "losa_runtime/cache/", "losa_runtime/scheduler/", "server/losa_server/"
PREFIX, SCHEDULING = "tests/cache/test_prefix_cache.py", "tests/scheduler/test_scheduler.py"
SHIFTED = "tests/scheduler/test_shifted_logits.py"


class Mutant(NamedTuple):
    """One bug. test: file, or file::test."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = (
    Mutant(
        "a prefix is matched inside a unit",
        CACHE + "radix.py",
        "return at - at % self.unit",
        "return at - at % self.page_size if self.unit > self.page_size else at",
        PREFIX,
    ),
    Mutant(
        "locked leaves are evicted",
        CACHE + "radix.py",
        "return node.parent is not None and node.locks == 0 and not node.children",
        "return node.parent is not None and not node.children",
        PREFIX,
    ),
    Mutant(
        "namespaces share a root",
        CACHE + "radix.py",
        "root = self._roots.get(namespace) or",
        "root = next(iter(self._roots.values()), None) or",
        PREFIX,
    ),
    Mutant(
        "a look into the tree sees other namespaces",
        CACHE + "radix.py",
        "node, done = self._roots.get(namespace), 0",
        "node, done = next(iter(self._roots.values()), None), 0",
        PREFIX,
    ),
    Mutant(
        "duplicates of shared pages are not freed",
        CACHE + "prefix_cache.py",
        "        self._free(duplicates)\n",
        "",
        PREFIX,
    ),
    Mutant(
        "a lease that is closed keeps its pages",
        CACHE + "prefix_cache.py",
        "        self._free(lease.pages[lease.shared : lease.count].copy())\n",
        "",
        PREFIX,
    ),
    Mutant(
        "the pool hands out a page twice",
        CACHE + "page_pool.py",
        "        self._count -= count\n",
        "        self._count -= max(0, count - 1)\n",
        PREFIX,
    ),
    Mutant(
        "a retracted request goes on with the block it had",
        SCHEDULER + "req.py",
        "        self.block = self.opening = self.first = None\n        self.cost.retractions += 1\n",
        "        self.opening = self.first = None\n        self.cost.retractions += 1\n",
        SCHEDULING,
    ),
    Mutant(
        "a retracted request goes to the end of the queue",
        SCHEDULER + "scheduler.py",
        "        self.waiting.appendleft(req)\n",
        "        self.waiting.append(req)\n",
        SCHEDULING,
    ),
    Mutant(
        "a stop token does not wait for the masks before it",
        SCHEDULER + "block.py",
        "for offset in range(self.known, min(self.settled, self.limit)):",
        "for offset in range(self.known, self.limit):",
        SCHEDULING,
    ),
    Mutant(
        "requests that arrive together all prefill their prefix",
        SCHEDULER + "scheduler.py",
        "        if not self.cache.reuse:\n            return False\n        for other",
        "        return False\n        for other",
        SCHEDULING,
    ),
    Mutant(
        "the oldest gives way under pressure",
        SCHEDULER + "scheduler.py",
        "victim = max(",
        "victim = min(",
        SCHEDULING,
    ),
    Mutant(
        "scoring takes all rows from others",
        SCHEDULER + "scoring.py",
        "rows = budget if alone else budget // 2",
        "rows = budget",
        "tests/scheduler/test_scoring.py",
    ),
    Mutant(
        "a short scoring waits for a long one",
        SCHEDULER + "scoring.py",
        "each = max(1, total // len(hungry))",
        "each = total",
        "tests/scheduler/test_scoring.py",
    ),
    Mutant(
        "paths that begin like a probe are open",
        SERVER + "http/guard.py",
        "if path in OPEN:",
        "if path.startswith(tuple(OPEN)):",
        "tests/server/test_access.py",
    ),
    Mutant(
        "any key may manage",
        SERVER + "http/guard.py",
        "if path in ADMIN and not caller.admin:",
        "if path in ADMIN and caller is None:",
        "tests/server/test_access.py",
    ),
    Mutant(
        "comparing keys ends at the first that fits",
        SERVER + "keys.py",
        "                found = key.caller\n",
        "                return key.caller\n",
        "tests/server/test_access.py",
    ),
    Mutant(
        "tenants share their prefix caches",
        SERVER + "visit.py",
        'return f"@{len(self.salt)}:{self.salt}:{asked}" if self.salt else asked',
        "return asked",
        "tests/server/test_access.py",
    ),
    Mutant(
        "anybody aborts anybody's requests",
        SERVER + "request_manager.py",
        "if who.admin or g.visit.caller.name == who.name",
        "if g.label",
        "tests/server/test_access.py",
    ),
    Mutant(
        "pages of other sites may call",
        SERVER + "http/guard.py",
        'if site in ("cross-site", "same-site") or',
        'if site == "never" or',
        "tests/server/test_access.py",
    ),
    Mutant(
        "the last of two equal keys of a body wins",
        SERVER + "http/body.py",
        "    if len(names) != len(pairs):",
        "    if len(names) > len(pairs):",
        "tests/server/test_http_native.py::test_broken_json",
    ),
    Mutant(
        "bodies are measured by what they declare",
        SERVER + "http/limits.py",
        "if size > self._settings.max_body_bytes:",
        "if size < 0:",
        "tests/server/test_http_native.py::test_too_large_bodies",
    ),
    Mutant(
        "a client that does not read is waited for",
        SERVER + "http/protocol.py",
        "            self._stall = self.loop.call_later(self._stall_s, self.transport.abort)\n",
        "            self._stall = None\n",
        "tests/server/test_limits.py::test_a_client_that_does_not_read_is_cut_off",
    ),
    Mutant(
        "faults of ours are told with their paths",
        SERVER + "errors.py",
        '        text = _PATH.sub("<path>", text.partition',
        '        text = _PATH.sub(r"\\g<0>", text.partition',
        "tests/server/test_http_native.py::test_messages_for_strangers",
    ),
    Mutant(
        "requests of clients that have left go on",
        SERVER + "http/body.py",
        '    while (await request.receive())["type"] != "http.disconnect":\n',
        '    while (await request.receive())["type"] != "never":\n',
        "tests/server/test_leaving.py::test_a_client_that_leaves_is_aborted",
    ),
    Mutant(
        "generations are forgotten without an abort",
        SERVER + "engine_client.py",
        "and not finished",
        "and finished",
        "tests/server/test_leaving.py",
    ),
    Mutant(
        "a frame with too many parts is taken for its first",
        SERVER + "channel.py",
        "            if len(frames) != 1:\n",
        "            if len(frames) < 1:\n",
        "tests/server/test_messages.py::test_hostile_frames_are_dropped_and_counted",
    ),
    Mutant(
        "every log line of a client's may be two",
        SERVER + "logs.py",
        '.replace("\\n", "\\\\n").replace("\\r", "\\\\r")',
        "",
        "tests/server/test_logs.py::test_fields_are_at_the_end_of_a_text_line",
    ),
    Mutant(
        "processes look for modules where the user stands",
        SERVER + "engine_life.py",
        '(sys.executable, "-P", "-m", "losa_server.engine_process")',
        '(sys.executable, "-m", "losa_server.engine_process")',
        "tests/models/test_hostile_folders.py::"
        "test_the_server_and_its_processes_run_nothing_of_the_folder_they_are_started_in",
    ),
    Mutant(
        "engines are replaced for ever",
        SERVER + "supervisor.py",
        "        self._times.append(now)\n",
        "",
        "tests/server/test_supervision.py::test_too_many_restarts_end_the_server",
    ),
    Mutant(
        "blocks go on after a forward that raised in their middle",
        SCHEDULER + "scheduler.py",
        "                req.reopen()\n",
        "",
        "tests/engine/test_isolation.py",
    ),
    Mutant(
        "what a failed request has stored stays in the tree",
        SCHEDULER + "scheduler.py",
        "        self.cache.condemn(req.lease, req.trusted)\n",
        "",
        SCHEDULING,
    ),
    Mutant(
        "keys that are no numbers are shared",
        "losa_runtime/runner/model_runner.py",
        "nothing() if sound_T[s.start : s.stop].all() else nothing(_BROKEN) for",
        "nothing() for",
        "tests/engine/test_isolation.py",
    ),
    Mutant(
        "condemned pages never come free",
        CACHE + "radix.py",
        "if node.locks == 0 and node.condemned:",
        "if node.locks < 0 and node.condemned:",
        PREFIX,
    ),
    Mutant(
        "clients of a lost engine are not told",
        SERVER + "engine_client.py",
        "        self.fail_all(EngineUnavailable(self._trouble))\n",
        "",
        "tests/server/test_supervision.py",
    ),
    Mutant(
        "a stopping server breaks off what it has accepted",
        SERVER + "launch.py",
        'client.drain("the server is shutting down")',
        'client.refuse("the server is shutting down")',
        "tests/server/test_drain.py",
    ),
    Mutant(
        "aborts are not sent while a server drains",
        SERVER + "engine_client.py",
        "        if self._life is not None and self._life.up:\n            self._post(AbortRequest",
        "        if self.healthy:\n            self._post(AbortRequest",
        "tests/server/test_leaving.py",
    ),
    Mutant(
        "requests on their way to the engine do not count",
        SERVER + "queue_view.py",
        "return self.waiting + self._sent - self._received",
        "return self.waiting",
        "tests/server/test_vigil.py",
    ),
    Mutant(
        "a prompt that the cache has as a whole leaves the next token without logits",
        SCHEDULER + "scheduler.py",
        "needed = self.limits.shifted_logits and",
        "needed = not self.limits.shifted_logits and",
        SHIFTED,
    ),
    Mutant(
        "a first token ends a request before its scores are there",
        SCHEDULER + "scheduler.py",
        "r.first is not None and r.block is None and not r.unscored",
        "r.first is not None and r.block is None",
        SHIFTED,
    ),
    Mutant(
        "the row before a candidate does not speak for it",
        "losa_runtime/runner/unmask.py",
        "for s in chunk]) - shift",
        "for s in chunk])",
        "tests/engine/test_shifted_logits.py",
    ),
    Mutant(
        "a grammar accepts tokens of sub-blocks that are not open",
        "losa_runtime/runner/windows.py",
        "else offsets < item.window.stop",
        "else offsets >= 0",
        "tests/engine/test_sub_blocks.py",
    ),
    Mutant(
        "a sub-block goes on with the plan of the one before",
        SCHEDULER + "block.py",
        "self.sub_steps + 1 if self.sub_block == was_open else 0",
        "self.sub_steps + 1",
        "tests/decoding/test_sub_blocks.py",
    ),
    Mutant(
        "blocks that begin anywhere are stored as if counted from position 0",
        "losa_runtime/sparse/attend.py",
        "    return segment.prefix_len % block_length == 0 and ",
        "    return ",
        "tests/engine/test_block_grid.py",
    ),
    Mutant(
        "an expert's weight has the bias of the choice",
        "losa_runtime/layers/router.py",
        "weight_TK = score_TE.gather(-1, chosen_TK)",
        "weight_TK = choice_TE.gather(-1, chosen_TK)",
        "tests/models/test_families.py",
    ),
    Mutant(
        "groups of experts are as good as their best one",
        "losa_runtime/layers/router.py",
        "group_TN = score_TNE.topk(2, dim=-1).values.sum(-1)",
        "group_TN = score_TNE.topk(1, dim=-1).values.sum(-1)",
        "tests/models/test_families.py",
    ),
)
