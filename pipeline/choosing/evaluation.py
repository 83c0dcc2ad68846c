"""Evaluating checkpoints by the user's own means, each in a process of its own.

What an evaluation says is kept as it comes, in `evaluations/` beside the candidates, together with what was asked: what
is there is not asked again. What it prints besides may hold secrets: its last line is shown, and all of it kept in a
log of its own that only the user may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from fapm.choosing.skills import SKILLS, Measure, read_skills
from fapm.choosing.sources import Source, at_hand
from fapm.errors import PassingError, UserError, duration
from fapm.schemas import EvaluationRecord
from fapm.storage.records import read_record
from fapm.storage.store import Store

CHECKPOINT = "{checkpoint}"
VARIABLE = "FAPM_CHECKPOINT"
"""In the environment of an evaluation, the path of the checkpoint."""
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_SAID_BYTES = 1 << 20  # of an answer that is read
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh", "busybox")
_IN_CODE = re.compile(r"[\s;&|<>$`'\"\\(){}*?#!~]")


@dataclass(frozen=True)
class Evaluation:
    """Questions that are asked of every checkpoint.

    Attributes:
        commands: words with `{checkpoint}` in them, or `package.module:function`; they say JSON.
        tasks: of lm-evaluation-harness, by skill: names, or YAML files.
        texts: files of text, by skill, whose cross entropy is measured.
        seconds: each may take.
        folder: in which they are asked, where a node has it.
    """

    commands: tuple[str, ...] = ()
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 3600.0
    folder: str = "."

    @property
    def is_none(self) -> bool:
        return not (self.commands or self.tasks or self.texts)

    def key(self) -> str:
        """Digest of what is asked; of texts and task files what is in them counts."""
        files = {**self.texts, **{name: name for names in self.tasks.values() for name in names if _is_file(name)}}
        digests = {name: hashlib.blake2b(Path(path).read_bytes()).hexdigest() for name, path in files.items()}
        asked = [self.commands, {k: list(v) for k, v in self.tasks.items()}, dict(self.texts), digests]
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()

    def asked(self, path: str) -> Iterator[list[str]]:
        """The command lines for a checkpoint in a folder on this machine."""
        folder = Path(__file__).parent
        call, harness, text = ([sys.executable, "-P", str(folder / f"{n}.py")] for n in ("call", "harness", "text"))
        for command in self.commands:
            if _FUNCTION.fullmatch(command):
                yield [*call, command, path]
            else:
                yield [word.replace(CHECKPOINT, path) for word in shlex.split(command)]
        if self.tasks:
            yield [*harness, path, *(f"{k}={','.join(v)}" for k, v in self.tasks.items())]
        if self.texts:
            yield [*text, path, *(f"{k}={v}" for k, v in self.texts.items())]


def evaluation(
    commands: Sequence[str], tasks: Sequence[str], texts: Sequence[str], seconds: float | None = None
) -> Evaluation:
    """Evaluation as a user asks for it, checked before anything is made.

    Args:
        tasks, texts: like `old=mmlu,hellaswag new=gsm8k`.

    Raises:
        UserError: it cannot be asked.
    """
    for command in commands:
        if not _FUNCTION.fullmatch(command):
            _check_command(command)
    files = _by_skill(texts, "--text")
    for path in files.values():
        if not Path(path).is_file():
            raise UserError(f"--text {path}: there is no such file")
    named = {skill: tuple(n for n in names.split(",") if n) for skill, names in _by_skill(tasks, "--tasks").items()}
    for name in (name for names in named.values() for name in names):
        if name.endswith((".yaml", ".yml")) and not _is_file(name):
            raise UserError(f"--tasks {name}: there is no such file")
    if named:
        _needs("lm_eval", "--tasks")
    if files:
        _needs("transformers", "--text")
    files = {skill: os.path.abspath(path) for skill, path in files.items()}
    named = {s: tuple(os.path.abspath(n) if _is_file(n) else n for n in names) for s, names in named.items()}
    limit = 3600.0 if seconds is None else seconds
    if limit <= 0:
        raise UserError(f"--evaluate-seconds: give a time above 0 (it is {limit:g})")
    return Evaluation(tuple(commands), named, files, limit, os.getcwd())


def _check_command(command: str) -> None:
    """Whether words can be told in a command, and no checkpoint's path would be read as code.

    Raises:
        UserError: they cannot, or it would.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--evaluate {command}: its quotes do not end ({error})") from None
    if not words or (CHECKPOINT not in command and VARIABLE not in command):
        raise UserError(
            f"--evaluate {command}: give a command with {CHECKPOINT} where the path belongs, or package.module:function"
        )
    shell = next((i for i, word in enumerate(words) if os.path.basename(word) in _SHELLS), None)
    for i, word in enumerate(words):
        rest = word.replace(CHECKPOINT, "")
        to_shell = shell is not None and i > shell and re.fullmatch(r"-\w*c", words[i - 1])
        if rest != word and (to_shell or _IN_CODE.search(rest) or i == 0):
            raise UserError(
                f"--evaluate {command}: a folder's name could be read as code there; no shell is used, so give "
                f"{CHECKPOINT} as a word or the end of one, or call a shell and write "
                f'"${VARIABLE}" in it: sh -c \'cd there && ./score "${VARIABLE}"\''
            )


def _needs(module: str, option: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise UserError(f"{option} needs {module.replace('_', '-')}: pip install 'fapm[eval]'")


def _by_skill(given: Sequence[str], option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in (word for text in given for word in text.split()):
        skill, equals, what = word.partition("=")
        if not equals or not what or skill not in SKILLS:
            raise UserError(f"{option} {word}: write it like old=… or new=…")
        if skill in found:
            raise UserError(f"{option}: {skill} is given twice")
        found[skill] = what
    return found


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


@dataclass(frozen=True)
class Said:
    """Answer of an evaluation about a checkpoint: its skills, or why there are none.

    Attributes:
        last: the last line that it printed when it failed, which is shown and not kept.
        printed: the end of all that it printed.
    """

    name: str
    skills: dict[str, Measure]
    error: str = ""
    seconds: float = 0.0
    last: str = field(default="", compare=False)
    printed: str = field(default="", compare=False)

    def __str__(self) -> str:
        if self.error:
            return f"{self.name} could not be evaluated: {self.error}" + (f": {self.last}" if self.last else "")
        return f"{self.name}: " + ", ".join(f"{skill} {measure}" for skill, measure in self.skills.items())


def evaluate(asked: Evaluation, source: Source, live: Path | None = None) -> Said:
    """Evaluate one checkpoint here. Errors are what it says, so that they do not end others.

    Args:
        live: a file to which goes what is printed on stderr, as it comes.
    """
    began = time.perf_counter()
    skills: dict[str, Measure] = {}
    error, last, logged = "", "", list[str]()
    try:
        with at_hand(source) as path:
            for command in asked.asked(path):
                code, printed, complaints = _run(command, path, asked.seconds, asked.folder, live)
                logged += [complaints, printed]
                if code is None:
                    error = f"it took longer than {asked.seconds:g} s (--evaluate-seconds)"
                elif code:
                    error = f"signal {-code}" if code < 0 else f"exit code {code}"
                    last = "".join(_last_lines(complaints, 1)) or "it said nothing on stderr"
                else:
                    try:
                        skills |= read_skills(_answer(printed))
                    except UserError as wrong:
                        error, last = "what it printed says no skills", str(wrong)
                if error:
                    break
    except UserError as failed:
        error = str(failed)
    seconds = round(time.perf_counter() - began, 3)
    return Said(source.name, {} if error else skills, error, seconds, last, "".join(logged))


def _run(
    command: Sequence[str], path: str, seconds: float, folder: str, live: Path | None
) -> tuple[int | None, str, str]:
    """Run a command; its exit code, None where the time was up, and the ends of what it printed on stdout and stderr.

    Nothing that it started lives on, also when this process is killed meanwhile.
    """
    supervisor = str(Path(__file__).with_name("supervise.py"))
    asleep, awake = os.pipe()  # closed with this process, whatever becomes of it
    with tempfile.TemporaryFile() as out, _stderr(live) as err:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", supervisor, str(asleep), *command],
                cwd=folder if os.path.isdir(folder) else None,
                env={**os.environ, VARIABLE: path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=[asleep],
                start_new_session=True,
            )
        finally:
            os.close(asleep)
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            os.close(awake)
            _end(process)
        return code, _tail(out), _tail(err)


def _stderr(live: Path | None) -> IO[bytes]:
    """Where a command's stderr goes: a file that is there, or one without a name."""
    if live is None:
        return tempfile.TemporaryFile()
    return open(os.open(live, os.O_RDWR | os.O_TRUNC | os.O_NOFOLLOW), "r+b")


def _last_lines(text: str, count: int) -> list[str]:
    """The last lines that are not empty, as they are shown."""
    return [line.strip()[:300] for line in text.splitlines() if line.strip()][-count:]


def _answer(printed: str) -> Any:
    """The JSON that a command has printed: all of it, or the last line that is an object.

    Raises:
        UserError: there is none.
    """
    for text in (printed, *reversed(printed.splitlines())):
        if text.lstrip().startswith("{"):
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                continue
    raise UserError('it printed no JSON object like {"new": 0.93, "old": 0.81}')


def _tail(file: Any) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SAID_BYTES))
    text: str = file.read().decode(errors="replace")
    return text


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait until a supervisor has ended everything, and end it if it does not."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


Begun = Callable[[str], Path | None]
"""Told the name of a checkpoint that is evaluated now, and says where on this machine its stderr may be followed."""

Evaluate = Callable[[Evaluation, Sequence[Source], Begun], Iterator[Said]]
"""Evaluates checkpoints, in any order, tells the name of each that it begins with, and says each result as it comes."""


def in_turn(asked: Evaluation, sources: Sequence[Source], begun: Begun) -> Iterator[Said]:
    """One after the other, here."""
    for source in sources:
        yield evaluate(asked, source, begun(source.name))


def evaluate_all(
    asked: Evaluation,
    sources: Sequence[Source],
    kept: Store,
    do: Evaluate = in_turn,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Said]:
    """Answers about checkpoints, by name, in their order: those kept from before, and those asked for now.

    Args:
        kept: the folder in which it is kept. What failed is asked again.
    """
    key = asked.key()
    found = {source.name: said for source in sources if (said := _kept(kept, source, key))}
    missing = [source for source in sources if source.name not in found]
    began, started = time.perf_counter(), list[str]()

    def begun(name: str) -> Path | None:
        done, seconds = len([one for one in missing if one.name in found]), time.perf_counter() - began
        started.append(name)
        left = f", some {duration(seconds / done * (len(missing) - done))} left" if done else ""
        say(f"evaluating {name} ({len(started)} of {len(missing)}){left}")
        if kept.local_path is None or do is not in_turn:
            return None
        kept.write_private(_file(name, ".log"), b"")
        live = kept.local_path / _file(name, ".log")
        if len(started) == 1:
            say(f"what it says meanwhile is in {live}")
        return live

    for said in do(asked, missing, begun) if missing else ():
        source = next(source for source in missing if source.name == said.name)
        if said.printed:
            kept.write_private(_file(said.name, ".log"), said.printed.encode())
        else:
            kept.remove(_file(said.name, ".log"))
        kept.write(_file(said.name), json.dumps(_facts(said) | {"key": key, "of": source.identity}, indent=1).encode())
        found[said.name] = said
        where = (
            f"; all that it printed is in {kept.at(_file(said.name, '.log'))}" if said.error and said.printed else ""
        )
        say(f"{said}, {duration(said.seconds)}{where}")
    return {source.name: found[source.name] for source in sources}


def printed_by(said: Said) -> list[str]:
    """The last lines that a failed evaluation has printed."""
    return _last_lines(said.printed, 5)


def _facts(said: Said) -> dict[str, Any]:
    return {
        "skills": {skill: asdict(m) for skill, m in said.skills.items()},
        "error": said.error,
        "seconds": said.seconds,
    }


def _file(name: str, suffix: str = ".json") -> str:
    plain = re.fullmatch(r"\w[\w.+-]*", name)
    return f"evaluations/{name if plain else hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}{suffix}"


def _kept(folder: Store, source: Source, key: str) -> Said | None:
    if not folder.has(_file(source.name)):
        return None
    try:
        data = read_record(folder, _file(source.name), EvaluationRecord, "no evaluation")
    except PassingError:
        raise
    except UserError:
        return None
    if data["key"] != key or data["of"] != source.identity or data["error"]:
        return None
    skills = {skill: Measure(**measure) for skill, measure in data["skills"].items()}
    return Said(source.name, skills, "", data["seconds"])


def skills_of(said: Iterable[Said]) -> dict[str, dict[str, Measure]]:
    """The skills of those that could be evaluated, by name."""
    return {one.name: one.skills for one in said if not one.error}
