"""Code evaluations: the real EvalPlus in its own environment and in the sandbox, on HumanEval's problems."""

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from processes import run

from parablock.evals import code, sandbox
from parablock.evals.code import CodeScore, chat_prompt, cut_answer, load_problems, prepare, score
from parablock.evals.results import read

HERE = Path(__file__).parent
GIBIBYTE = 1 << 30
PATIENT = 30.0  # seconds for one test on a busy machine


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EvalPlus's environment, in the user's cache: made once per machine."""
    script = tmp_path_factory.mktemp("probe") / "probe.py"
    script.write_text("open('/out/result', 'w').close()")
    try:
        sandbox.run(Path(sys.executable), script, [], {}, memory=GIBIBYTE, seconds=60, processes=8)
    except ValueError as error:
        if "refuses the sandbox" in str(error):
            pytest.skip(str(error))
        raise
    return prepare()


@pytest.fixture(scope="module")
def humaneval(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HumanEval in EvalPlus's format: half of a problem's inputs are its base tests, half its extra ones."""
    raw = gzip.decompress((HERE / "data" / "HumanEval.jsonl.gz").read_bytes())
    files = {"HumanEval.jsonl": raw}
    rows = sandbox.run(
        python, HERE / "record_inputs.py", [], files, memory=GIBIBYTE, seconds=300, processes=8
    )  # fmt: skip
    file = tmp_path_factory.mktemp("problems") / "HumanEvalPlus.jsonl"
    file.write_bytes(rows)
    return file


@pytest.fixture(scope="module")
def canonical(humaneval: Path) -> dict[str, str]:
    rows = map(json.loads, humaneval.read_text().splitlines())
    return {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in rows}


def run_script(python: Path, folder: Path, text: str, **limits: Any) -> bytes:
    script = folder / f"{folder.name}.py"
    script.write_text(textwrap.dedent(text))
    return sandbox.run(
        python, script, [], {}, **{"memory": GIBIBYTE, "seconds": 300, "processes": 8, "scratch": 16 << 20, **limits}
    )


# the command


def test_the_command_asks_saves_and_scores(humaneval: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = ["--tasks", "humaneval", "--run-code", "--data", f"humaneval={humaneval}", "--limit", "3"]
    done = run("eval", "bundled", *options, "--max-new-tokens", "64", "-o", folder)
    assert done.returncode == 0, done.stderr
    report, samples = read(folder)
    found = report["tasks"]["humaneval"]
    assert (found["questions"], found["of"]) == (3, 164)
    assert found["metrics"]["pass@1,base"]["value"] == 0.0  # a model of word problems writes no programs
    assert found["speed"]["responses"] == 3
    assert [(s.number, s.filter) for s in samples] == [(n, kind) for kind in ("base", "plus") for n in range(3)]
    answers = json.loads((folder / "humaneval-answers.json").read_text())
    assert [s.response for s in samples[:3]] == list(answers.values())
    assert "pass@1,plus" in done.stdout


# EvalPlus


def test_canonical_solutions_pass_all_tests(python: Path, humaneval: Path, canonical: dict[str, str]) -> None:
    scores = score("humaneval", canonical, python, file=humaneval, memory=GIBIBYTE, test_seconds=PATIENT)
    assert [s.task_id for s in scores] == list(canonical)
    assert len(scores) == 164
    assert [s.task_id for s in scores if not (s.base and s.plus)] == []


def test_base_and_extra_tests_are_told_apart(python: Path, humaneval: Path, canonical: dict[str, str]) -> None:
    row = json.loads(humaneval.read_text().splitlines()[0])
    known = [[repr(given), eval_canonical(canonical["HumanEval/0"], given)] for given in row["base_input"]]
    by_heart = f"def has_close_elements(*given):\n    return dict({known!r}).get(repr(list(given)))\n"
    answers = {"HumanEval/0": by_heart, "HumanEval/1": "def separate_paren_groups(text):\n    return []\n"}
    scores = score("humaneval", answers, python, file=humaneval, memory=GIBIBYTE, test_seconds=PATIENT)
    assert [(s.base, s.plus) for s in scores] == [(True, False), (False, False)]


def eval_canonical(text: str, given: list[Any]) -> Any:
    names: dict[str, Any] = {}
    exec(text, names)
    return names["has_close_elements"](*given)


def test_wrong_root_fails(python: Path, humaneval: Path) -> None:
    """HumanEval/32 is judged by the polynomial's value; EvalPlus 0.3.1 alone would fail every solution."""
    text = "def find_zero(xs):\n    return 0.123\n"
    (wrong,) = score("humaneval", {"HumanEval/32": text}, python, file=humaneval, memory=GIBIBYTE)
    assert not wrong.base


def test_scores_that_mean_nothing_are_an_error(python: Path, humaneval: Path, tmp_path: Path) -> None:
    """The control, EvalPlus's own solution, fails: here it gives something else every time."""
    row = json.loads(humaneval.read_text().splitlines()[0])
    file = tmp_path / "random.jsonl"
    file.write_text(json.dumps(row | {"canonical_solution": "    import random\n    return random.random()\n"}))
    with pytest.raises(ValueError, match=r"fails its own solution of HumanEval/0 \(base tests: fail"):
        score("humaneval", {"HumanEval/0": "x = 1"}, python, file=file, memory=GIBIBYTE)


def test_code_is_found_in_an_answer(python: Path, humaneval: Path, canonical: dict[str, str]) -> None:
    chatty = f"Of course! Here is it:\n\n```python\n{canonical['HumanEval/2']}\n```\n\nIt takes the fraction. Any more?"
    (found,) = score("humaneval", {"HumanEval/2": chatty}, python, file=humaneval, memory=GIBIBYTE)
    assert found.solution.startswith("def truncate_number")
    assert "```" not in found.solution
    assert "Any more" not in found.solution
    (nothing,) = score("humaneval", {"HumanEval/2": "I can't."}, python, file=humaneval, memory=GIBIBYTE)
    assert not nothing.base


def test_chat_prompt_is_evalplus_own(python: Path, humaneval: Path) -> None:
    problems = load_problems("humaneval", python, humaneval)
    assert len(problems) == 164
    messages, beginning = chat_prompt(problems[0])
    assert [m["role"] for m in messages] == ["user"]
    assert problems[0].prompt.strip() in messages[0]["content"]
    assert "self-contained Python script" in messages[0]["content"]
    assert beginning.endswith("\n```python\n")
    assert cut_answer(problems[0], "def f():\n\treturn 1\n```\nThis is it.") == "def f():\n    return 1"
    assert cut_answer(problems[0], "def f(): return 1") == "def f(): return 1"


def test_mbpp_file(python: Path, tmp_path: Path) -> None:
    """MBPP's inputs are read by EvalPlus's own rules: here, lists become tuples (Mbpp/2)."""
    row = {
        "task_id": "Mbpp/2",
        "prompt": '"""\nWrite a function to find the shared elements from the given two lists.\n"""\n',
        "contract": "",
        "entry_point": "similar_elements",
        "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
        "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]],
        "plus_input": [[[1, 2], [2, 3]], [[], []]],
        "atol": 0,
    }
    file = tmp_path / "MbppPlus.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(row).encode()))
    (problem,) = load_problems("mbpp", python, file)
    assert problem.entry_point == "similar_elements"
    text = "def similar_elements(a, b):\n    assert isinstance(a, tuple)\n    return [x for x in a if x in b]\n"
    (passed,) = score("mbpp", {"Mbpp/2": text}, python, file=file, memory=GIBIBYTE, test_seconds=PATIENT)
    assert passed == CodeScore("Mbpp/2", text.strip(), base=True, plus=True)


# what answers may do


def test_harmful_answers_fail_and_harm_nobody(
    python: Path, humaneval: Path, canonical: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these passes only if what it tries is refused, or never; the others' scores stay right."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    target = tmp_path / "written"
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0)
    port = listener.getsockname()[1]
    first = "    "

    def doing(task_id: str, text: str) -> str:
        """The canonical solution, after something else."""
        row = rows[task_id]
        body = textwrap.indent(textwrap.dedent(text).strip("\n"), first)
        return f"{row['prompt']}\n{body}\n{row['canonical_solution']}"

    rows = {row["task_id"]: row for row in map(json.loads, humaneval.read_text().splitlines())}
    answers = {
        "HumanEval/0": canonical["HumanEval/0"],
        "HumanEval/2": doing("HumanEval/2", "while True: pass"),
        "HumanEval/3": doing("HumanEval/3", "hog = [bytearray(1 << 28) for _ in range(64)]"),
        "HumanEval/4": doing(
            "HumanEval/4",
            f"""
            import socket
            for address in ("127.0.0.1", {socket.gethostname()!r}):
                try:
                    socket.create_connection((address, {port}), 5)
                except OSError:
                    continue
                raise RuntimeError("reached")
            """,
        ),
        "HumanEval/5": doing(
            "HumanEval/5",
            f"""
            import os, pathlib
            for place in ({str(target)!r}, {str(Path.home() / "parablock-was-here")!r}, "/usr/parablock-was-here"):
                try:
                    pathlib.Path(place).write_text("x")
                except OSError:
                    continue
                raise RuntimeError("written")
            assert not os.path.exists({str(humaneval)!r})
            """,
        ),
        "HumanEval/8": doing("HumanEval/8", "import os\nassert not {'HF_TOKEN', 'USER'} & set(os.environ)"),
        "HumanEval/9": doing(
            "HumanEval/9",
            """
            import ctypes, os, threading
            for _ in range(3):
                child = ctypes.CDLL(None).fork()
                if child == 0:
                    os._exit(0)
                assert child == -1
            try:
                threading.Thread(target=print).start()
            except RuntimeError:
                pass
            else:
                raise AssertionError("a thread")
            """,
        ),
        "HumanEval/13": doing(
            "HumanEval/13", "import pathlib\npathlib.Path('large').write_bytes(bytes(40_000_000))"
        ),
        "HumanEval/14": canonical["HumanEval/14"],
    }  # fmt: skip
    scores = score("humaneval", answers, python, file=humaneval, memory=GIBIBYTE)
    assert [s.task_id.split("/")[1] for s in scores if s.plus] == ["0", "4", "5", "8", "9", "14"]
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert not target.exists()
    assert not (Path.home() / "parablock-was-here").exists()


def test_sandbox_shows_nothing_of_the_machine(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    abstract = socket.socket(socket.AF_UNIX)
    name = f"\0parablock-{os.getpid()}"
    abstract.bind(name)  # these need no file
    abstract.listen()
    seen = json.loads(
        run_script(
            python,
            tmp_path,
            f"""
            import ctypes, json, os, socket
            libc = ctypes.CDLL(None, use_errno=True)
            def refused(action):
                try:
                    return action() == -1
                except OSError:
                    return True
            def write(path):
                with open(path, "w") as file:
                    file.write("x")
            def connect():
                socket.socket(socket.AF_UNIX).connect({name!r})
            seen = {{
                "root": sorted(os.listdir("/")),
                "environment": sorted(os.environ),
                "others": [p for p in range(5, 400) if not refused(lambda: os.kill(p, 0))],
                "socket": refused(connect),
                "write": [refused(lambda: write(p)) for p in ("/x", "/usr/x", "/job/x", "/proc/x", "/dev/x")],
                "mount": refused(lambda: libc.mount(b"x", b"/tmp", b"tmpfs", 0, None)),
                "namespace": refused(lambda: libc.unshare(0x10000000) or libc.mount(None, b"/usr", None, 4128, None)),
                "first": refused(lambda: os.kill(1, 9)),
            }}
            write("/tmp/x")
            write("/out/x")
            open("/out/result", "w").write(json.dumps(seen))
            """,
        )
    )
    home = set(Path(sys.base_prefix).parts[1:2]) | set(python.parts[1:2])  # the way to Python
    assert set(seen.pop("root")) <= {"bin", "dev", "etc", "job", "lib", "lib32", "lib64", "out", "proc", "sbin"} | {
        "tmp", "usr"} | home  # fmt: skip
    assert seen.pop("environment") == ["HOME", "LANG", "PATH", "TMPDIR"]
    assert seen.pop("write") == [True] * 5
    assert seen.pop("others") == []
    seen.pop("first")  # the kernel takes the signal, and the first process ignores it: there is a result
    assert seen == {"socket": True, "mount": True, "namespace": True}


def test_sandbox_bounds_processes_memory_and_files(python: Path, tmp_path: Path) -> None:
    seen = json.loads(
        run_script(
            python,
            tmp_path,
            """
            import json, os, signal
            children = []
            try:
                for _ in range(40):
                    child = os.fork()
                    if child == 0:
                        signal.pause()
                    children.append(child)
            except BlockingIOError:
                pass
            try:
                memory = len(bytearray(2 << 30))
            except MemoryError:
                memory = 0
            written = 0
            try:
                for number in range(40):
                    with open(f"/tmp/{number}", "wb") as file:
                        written += file.write(bytes(1 << 20))
            except OSError:
                pass
            open("/out/result", "w").write(json.dumps([len(children), memory, written]))
            """,
        )
    )
    children, memory, written = seen
    assert 1 <= children <= 8
    assert memory == 0
    assert written <= 16 << 20


def test_time_that_is_over_ends_everything(python: Path, tmp_path: Path) -> None:
    marker = tmp_path.name  # in the script's name, and so in its command line
    with pytest.raises(ValueError, match=r"longer than seconds=3 and was ended"):
        run_script(python, tmp_path, "import os, time\nos.fork()\nos.setsid()\ntime.sleep(100_000)", seconds=3)

    def running() -> list[bytes]:
        lines = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(process.read_bytes())
            except OSError:  # it has just ended
                continue
        return [line for line in lines if f"/job/{marker}.py".encode() in line]

    while running():  # the kernel ends them soon; the test's own time limit says if not
        time.sleep(0.05)


def test_script_that_fails_shows_its_last_lines(python: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)failed in the sandbox.*KeyError: 'lost'.*exit status 1"):
        run_script(python, tmp_path, "print('x' * 100_000)\nraise KeyError('lost')")
    with pytest.raises(ValueError, match="ended by SIGSEGV"):
        run_script(python, tmp_path, "import ctypes; ctypes.string_at(0)")


def test_crash_of_evalplus_is_told(python: Path, humaneval: Path, tmp_path: Path) -> None:
    row = json.loads(humaneval.read_text().splitlines()[0]) | {"canonical_solution": "    return 1 / 0\n"}
    file = tmp_path / "broken.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"(?s)evalplus_job.py failed in the sandbox.*ZeroDivisionError"):
        score("humaneval", {"HumanEval/0": "x = 1"}, python, file=file, memory=GIBIBYTE)


# where there is no sandbox


def in_namespace(before: str, program: str) -> subprocess.CompletedProcess[str]:
    """A Python program in a user namespace with one user only, as in many containers."""
    shell = shutil.which("unshare")
    if shell is None:
        pytest.skip("util-linux's unshare makes this machine a smaller one")
    return subprocess.run(
        [shell, "-Ur", "sh", "-c", f'{before} exec "$@"', "sh", sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        check=False,
    )


PROGRAM = """
    from pathlib import Path
    from parablock.evals import sandbox
    Path({script!r}).write_text("import os; open('/out/result', 'w').write(str(os.getuid()))")
    try:
        print(sandbox.run(Path({python!r}), Path({script!r}), [], {{}}, memory=1 << 30, seconds=300, processes=8))
    except ValueError as error:
        print(error)
"""


def test_refused_namespaces_are_an_error(python: Path, tmp_path: Path) -> None:
    program = PROGRAM.format(python=str(python), script=str(tmp_path / "hello.py"))
    done = in_namespace("echo 0 > /proc/sys/user/max_user_namespaces;", program)
    assert done.stdout.startswith("this machine refuses the sandbox (unshare: No space left on device)"), done.stderr
    assert "user.max_user_namespaces" in done.stdout


def test_sandbox_inside_a_namespace_with_one_user(python: Path, tmp_path: Path) -> None:
    done = in_namespace("", PROGRAM.format(python=str(python), script=str(tmp_path / "hello.py")))
    assert done.stdout == "b'0'\n", done.stdout + done.stderr


def test_other_systems_are_refused(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(ValueError, match="the sandbox needs Linux, and this is darwin"):
        run_script(python, tmp_path, "")


# what users get wrong


def test_wrong_tasks_files_and_answers(python: Path, humaneval: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task='human' is none of humaneval, mbpp"):
        load_problems("human", python, humaneval)
    with pytest.raises(ValueError, match="there is no file"):
        load_problems("humaneval", python, tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="'HumanEval/0', no Mbpp/"):
        load_problems("mbpp", python, humaneval)
    with pytest.raises(ValueError, match="line 1 has no atol, base_input, contract, plus_input"):
        load_problems("humaneval", python, HERE / "data" / "HumanEval.jsonl.gz")
    for content in (b"", b"no json", b"[1]\n", b"\x1f\x8bbroken", b"\xff\xfe"):
        (tmp_path / "wrong.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match="does not hold EvalPlus's problems for humaneval"):
            load_problems("humaneval", python, tmp_path / "wrong.jsonl")
    for answers, said in (({}, "no answers"), ({"HumanEval/999": ""}, "no problem of humaneval: HumanEval/999")):
        with pytest.raises(ValueError, match=said):
            score("humaneval", answers, python, file=humaneval)
    with pytest.raises(ValueError, match="memory=0 must be positive"):
        score("humaneval", {"HumanEval/0": ""}, python, file=humaneval, memory=0)
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        score("humaneval", {"HumanEval/0": ""}, python, file=humaneval, workers=0)


def test_environment_is_made_once_and_again_if_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_make", lambda command, needed: made.append(command) or fake(command))

    def fake(command: list[str]) -> None:
        if "venv" in command:
            Path(command[-1], "bin").mkdir(parents=True)
            Path(command[-1], "bin", "python").touch()

    made: list[list[str]] = []
    told: list[str] = []
    python = prepare(tmp_path, told.append)
    assert len(made) == 3
    assert prepare(tmp_path, told.append) == python
    assert len(made) == 3
    assert told[-1] == "the environment is ready"
    (python.parent.parent / "complete").unlink()  # as if the first had been interrupted
    assert prepare(tmp_path) == python
    assert len(made) == 6


def test_environment_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "REQUIREMENTS", ("parablock-no-such-package==1",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"(?s)could not be made; it needs access to a package index.*no-such-package"):
        prepare(tmp_path)
