"""Programs as answers: what is run, what guards it, and pass@k."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

from harness import harness_config, until
from lm_eval.utils import apply_template
import pytest

from tokenlora_jax.config import InputError
from tokenlora_jax.data.tasks import get_task
from tokenlora_jax.evaluation.scoring import (
  Limits,
  get_scorers,
  pass_at_k,
  sandbox,
)
from tokenlora_jax.evaluation.scoring.code import (
  HumanEvalTests,
  MbppTests,
  code,
)

# -----------------------------------------------------------------------------
# The reference.


@pytest.fixture(scope="module")
def mbpp():
  """The harness's functions for MBPP; its module asks the hub for a metric."""
  with pytest.MonkeyPatch.context() as patch:
    metric = SimpleNamespace(compute=lambda **_: None)
    stub = SimpleNamespace(load=lambda _: metric)
    patch.setitem(sys.modules, "evaluate", stub)
    yield importlib.import_module("lm_eval.tasks.mbpp.utils")


# -----------------------------------------------------------------------------
# The code in a text. By hand: text, code.

COMPLETIONS = [
  ("    return 1", "    return 1"),
  ("    return 1\n", "    return 1\n"),
  ("    return 1\n\nprint(f())", "    return 1\n"),
  ("    return 1\ndef g():\n    pass", "    return 1"),
  ("    return 1\n\n\nclass A:", "    return 1\n\n"),
  ("    return 1\n# next", "    return 1"),
  ("    return 1\nif True:\n    f()", "    return 1"),
  ("    if x:\n        return 1", "    if x:\n        return 1"),
  ("    # one\n    return 1", "    # one\n    return 1"),
  ("    print(1)\n    return 1", "    print(1)\n    return 1"),
  ("    return 1\n\nassert f()", "    return 1\n\nassert f()"),
  ("    return 1\nimport re\nprint(2)", "    return 1\nimport re"),
  ("    def g():\n        pass", "    def g():\n        pass"),
  ("    return 'def g'", "    return 'def g'"),
  ("    s = '''\n# text'''", "    s = '''"),
  ("    return 1\r\nprint(1)", "    return 1\r"),
  ("    return 1\nclassy = 2", "    return 1"),
  ("\treturn 1\n#", "\treturn 1"),
  ("    return `x`", "    return `x`"),
  ("    '''\n    ```\n    f()\n    ```\n    '''",) * 2,
  ("  ", "  "),
  ("", ""),
]
BLOCKS = [
  ("```python\nx = 1\n```", "x = 1\n"),
  ("```\nx = 1\n```", "x = 1\n"),
  ("```py\nx = 1\ny = 2\n```\nDone.", "x = 1\ny = 2\n"),
  ("```python\nx = 1\n```\nor\n```python\nx = 2\n```", "x = 1\n"),
  ("```python\n    return 1\n```", "    return 1\n"),
  ("```python\n\nx = 1\n\n```", "\nx = 1\n\n"),
  ("```python\nx = '`'\n```", "x = '`'\n"),
  ("```python\nx = 1\n\nprint(x)\n# end\n```", "x = 1\n\nprint(x)\n# end\n"),
]
MARKDOWN = [
  ("Sure!\n\n```python\nx = 1\n```\nDone.", "x = 1\n"),
  ("Sure!\n```\nx = 1\n```", "x = 1\n"),
  ("```python\nx = 1\n", "x = 1\n"),  # not closed
  ("```python\nx = 1", "x = 1"),
  ("```python", ""),
  ("```python title='x.py'\nx = 1\n```", "x = 1\n"),
  ("```python  \r\nx = 1\r\n```", "x = 1\r\n"),
  ("    return 1\n```\nDone.", "    return 1"),  # the prompt opened it
  ("    return 1\n```\nSo\n```python\nf()\n```", "    return 1"),
  ("    return 1\n\nprint(1)\n```", "    return 1\n"),
  ("x = 1\n~~~", "x = 1\n~~~"),
]


@pytest.mark.parametrize(("text", "expected"), COMPLETIONS)
def test_completions_are_the_harness(text, expected):
  assert code(text, HumanEvalTests.stop) == expected
  assert until("humaneval", text) == expected


@pytest.mark.parametrize(("text", "expected"), BLOCKS)
def test_blocks_are_the_harness(text, expected, mbpp):
  assert code(text, HumanEvalTests.stop) == expected
  theirs = mbpp.extract_code_blocks(text.removeprefix("```"))
  assert theirs == expected.removesuffix("\n")


@pytest.mark.parametrize(("text", "expected"), MARKDOWN)
def test_code_in_markdown(text, expected):
  assert code(text, HumanEvalTests.stop) == expected


# -----------------------------------------------------------------------------
# HumanEval and MBPP.


def test_programs_run_only_if_asked_for():
  for name, scorer in (("humaneval", HumanEvalTests), ("mbpp", MbppTests)):
    for make in (lambda name=name: get_scorers(name), scorer):
      with pytest.raises(InputError, match="run_code: False is not allowed"):
        make()
    assert list(get_scorers(name, run_code=True)) == ["tests"]


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_built_in_solutions_pass_and_others_fail(name):
  task = get_task(name)
  scorer = get_scorers(name, run_code=True)["tests"]
  for row in task.generate(0, 3, "test"):
    answer = task.answer(row)
    assert scorer.score(answer, row) == {"pass@1": 1}
    wrong = answer.replace("return ", "return None, ")
    assert scorer.score(wrong, row) == {"pass@1": 0}


def test_humaneval_takes_a_body_or_a_whole_function():
  (row,) = get_task("humaneval").generate(1, 1, "test")
  scorer = get_scorers("humaneval", run_code=True)["tests"]
  body = row["canonical_solution"]
  assert scorer.program(body, row) == (
    f"{row['prompt']}{body}\n{row['test']}\ncheck(solve)"
  )
  for text, right in (
    (f"{body}\nprint(solve('x'))", 1),
    (f"```python\n{row['prompt']}{body}```\nDone.", 1),
    (f"{body}    return 0 + 'x'", 1),
    (f"    import sys\n    sys.exit(0)\n{body}", 0),
    (f"    print(x)\n{body}", 1),
    (body[1:], 0),
    ("", 0),
  ):
    assert scorer.score(text, row) == {"pass@1": right}, text


def test_mbpp_on_the_harness_own_rows(mbpp):
  task, config = get_task("mbpp"), harness_config("mbpp")
  scorer = get_scorers("mbpp", run_code=True)["tests"]
  assert list(scorer.stop) == config["generation_kwargs"]["until"]
  for row in mbpp.list_fewshot_samples():
    assert task.prompt(row) == apply_template(config["doc_to_text"], row)
    gold = apply_template(config["doc_to_target"], row)
    assert task.answer(row) == gold.replace("\r\n", "\n")
    assert scorer.score(f"{gold}\nand so on", row) == {"pass@1": 1}
    assert scorer.score(f"{gold[:-20]}[DONE]", row) == {"pass@1": 0}


def test_mbpp_setup_runs_between_program_and_tests():
  row = {"test_list": ["assert y == 3"], "test_setup_code": "y = x + 1"}
  scorer = get_scorers("mbpp", run_code=True)["tests"]
  assert scorer.program("x = 2", row) == "x = 2\ny = x + 1\nassert y == 3"
  assert scorer.score("x = 2", row) == {"pass@1": 1}
  assert scorer.score("x = 2", row | {"test_setup_code": ""}) == {"pass@1": 0}


# -----------------------------------------------------------------------------
# The sandbox. By hand: a program, and the error it ends with ("" is none).

THREADS = "import threading, time\nfor _ in range({}): threading.Thread("
PROGRAMS = [
  ("", ""),
  ("x = 1", ""),
  ("print('x' * 10**7)\nimport sys\nsys.stderr.write('x' * 10**6)", ""),
  ("def f(x: int): pass\nassert f.__annotations__ == {'x': int}", ""),
  ("import os\nopen(os.devnull, 'w').write('x')", ""),
  ("if __name__ == '__main__': 1 / 0", ""),
  ("import atexit\natexit.register(lambda: 1 / 0)", ""),
  ("import builtins, json, os\nbuiltins.open = json.dumps = os.write = 0", ""),
  ("from __future__ import annotations\nimport dataclasses\n"
   "@dataclasses.dataclass\nclass A:\n  x: int = 3\nassert A().x == 3", ""),
  ("import asyncio\nasync def f(): await asyncio.sleep(0)\nasyncio.run(f())",
   ""),
  ("import tempfile\nwith tempfile.TemporaryDirectory() as d:\n"
   "  open(d + '/x', 'w').write('x')", ""),
  ("import os\nassert os.listdir() == []\nwith open('x', 'w') as f:\n"
   "  f.write('x' * 10**6)\nos.rename('x', 'y')\n"
   "assert len(open('y').read()) == 10**6\nos.remove('y')", ""),
  (THREADS.format(3) + "target=time.sleep, args=(60,)).start()", ""),
  ("assert 1 == 2, 'no'", "AssertionError: no"),
  ("1 / 0", "ZeroDivisionError: division by zero"),
  ("raise KeyboardInterrupt", "KeyboardInterrupt"),
  ("class E(BaseException):\n  __str__ = lambda self: 1 / 0\nraise E",
   "program.E: <exception str() failed>"),
  ("def f(:", "SyntaxError: invalid syntax"),
  ("def f():\nreturn 1", "IndentationError: "),
  ("'\x00'", ": source code string cannot contain null bytes"),
  ("'\ud800'", "UnicodeEncodeError: "),
  ("raise SystemExit", "SystemExit"),
  ("import sys\nsys.exit(0)\nassert False", "SystemExit: 0"),
  ("exit()", "SystemExit: None"),
  ("import os\nos._exit(0)", "ended before its last line (status 0)"),
  ("import os\nos._exit(7)", "ended before its last line (status 7)"),
  ("import faulthandler\nfaulthandler._sigsegv()", "ended by SIGSEGV"),
  # What it prints is not its report.
  ("print('started\\n\"\"', flush=True)\nassert False", "AssertionError"),
  ("input()", "EOFError: "),
  ("f = lambda: f()\nf()", "RecursionError: "),
  ("x = 'x' * 10**10", "MemoryError"),
  ("x = []\nwhile True: x.append(bytes(10**7))", "MemoryError"),
  (THREADS.format(9999) + "target=time.sleep, args=(60,)).start()",
   "RuntimeError: can't start new thread"),
  ("import os\nos.fork()", "PermissionError: os.fork is not"),
  ("import os\nos.system('true')", "PermissionError: os.system is not"),
  ("import os\nos.execv('/bin/true', ['true'])", "PermissionError: os.exec "),
  ("import os\nos.posix_spawn('/bin/true', ['true'], {})",
   "PermissionError: os.posix_spawn is not"),
  ("import subprocess\nsubprocess.run(['true'])",
   "PermissionError: subprocess.Popen is not"),
  ("import multiprocessing as m\nm.Process(target=print).start()",
   "PermissionError: "),
  ("import os\nos.kill(os.getppid(), 9)", "PermissionError: os.kill is not"),
  ("import os\nos.killpg(0, 9)", "PermissionError: os.killpg is not"),
  ("import ctypes\nctypes.CDLL(None).fork()",
   "PermissionError: ctypes.dlopen is not"),
  ("import resource as r\nr.setrlimit(r.RLIMIT_CPU, (9, 9))",
   "PermissionError: resource.setrlimit is not"),
  ("open('x', 'w').write('x' * 2**21)", "OSError: [Errno 27] File too large"),
  ("for i in range(101): open(str(i), 'w')",
   "PermissionError: more than 100 writes are not allowed"),
  ("import os\nwhile True: os.mkdir('x'); os.rmdir('x')",
   "PermissionError: more than 100 writes are not allowed"),
]  # fmt: skip


def ended(program: str, **limits) -> str:
  # So much time that only a program that needs no end uses it up.
  usual = {"cpu_seconds": 40, "memory": 1 << 29}
  return sandbox.run(program, Limits(**usual | limits))


@pytest.mark.parametrize(("program", "error"), PROGRAMS)
def test_how_programs_end(program, error):
  start, result = time.monotonic(), ended(program)
  assert error in result
  assert (result == "") == (error == "")
  assert time.monotonic() - start < 50  # none waits for threads that sleep


def test_a_loop_without_end_runs_out_of_cpu_time():
  deaf = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
  assert ended(f"{deaf}while True: pass", cpu_seconds=1) == "ended by SIGKILL"


def test_a_program_that_sleeps_runs_out_of_time():
  assert (
    ended("import time\ntime.sleep(600)", seconds=4) == "took more than 4 s"
  )


def test_numpy_runs_within_the_usual_limits():
  program = "import numpy as np\nassert (np.eye(9) @ np.ones(9)).sum() == 9"
  assert sandbox.run(program, Limits()) == ""


REFUSED = """
import os, pathlib, shutil, socket, sqlite3, sys, urllib.request
for act in {acts!r}:
  try:
    exec(act)
  except OSError as error:
    if 'not allowed' in str(error):
      continue
  raise ValueError(act)
"""


def lines(acts: str) -> list[str]:
  return [line.strip() for line in acts.strip().splitlines()]


def test_nothing_outside_the_folder_is_changed(tmp_path):
  kept = tmp_path / "kept"
  kept.write_text("kept")
  before = kept.stat()
  acts = """
    open(path, 'w')
    open(path, 'a')
    open(path, 'r+')
    open(path.encode(), 'wb')
    open(os.path.relpath(path), 'w')
    open(path + '2', 'x')
    pathlib.Path(path).write_text('x')
    pathlib.Path(path).unlink()
    os.open(path, os.O_WRONLY)
    os.remove(path)
    os.rename(path, 'here')
    os.replace('here', path)
    os.truncate(path, 0)
    os.chmod(path, 0)
    os.utime(path)
    os.symlink(path, 'here')
    os.link(path, 'here')
    os.mkdir(path + '2')
    os.rmdir(os.path.dirname(path))
    shutil.rmtree(os.path.dirname(path))
    shutil.move(path, 'here')
    shutil.copy(sys.executable, path)
    sqlite3.connect(path + '2')
  """
  program = f"path = {str(kept)!r}{REFUSED.format(acts=lines(acts))}"
  assert ended(program) == ""
  assert list(tmp_path.iterdir()) == [kept]
  assert kept.read_text() == "kept"
  assert (kept.stat().st_mode, kept.stat().st_mtime_ns) == (
    before.st_mode, before.st_mtime_ns,
  )  # fmt: skip


def test_the_folder_is_fresh_and_goes_and_the_environment_is_empty(monkeypatch):
  monkeypatch.setenv("TOKEN", "secret")
  said = [ended("import os\nraise ValueError(os.getcwd())") for _ in range(2)]
  folders = [Path(x.removeprefix("ValueError: ")) for x in said]
  assert folders[0] != folders[1]
  assert not any(folder.exists() for folder in folders)
  assert Path.cwd() not in folders
  program = "import os\nassert not {'TOKEN', 'HOME', 'PATH'} & set(os.environ)"
  assert ended(program) == ""
  assert ended("import sys\nassert '' not in sys.path") == ""


# -----------------------------------------------------------------------------
# The network.


@pytest.fixture
def server():
  """A server on this machine, and whether somebody called it."""
  with socket.create_server(("127.0.0.1", 0)) as listener:
    listener.setblocking(False)

    def called() -> bool:
      try:
        listener.accept()[0].close()
      except BlockingIOError:
        return False
      return True

    yield SimpleNamespace(port=listener.getsockname()[1], called=called)


def test_no_program_reaches_the_network(server):
  acts = """
    socket.create_connection(('127.0.0.1', port))
    socket.socket().connect(('127.0.0.1', port))
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    socket.socket(socket.AF_UNIX).connect('/run/nobody')
    socket.create_server(('127.0.0.1', 0))
    urllib.request.urlopen(f'http://127.0.0.1:{port}')
    socket.getaddrinfo('example.com', 80)
  """
  program = f"port = {server.port}{REFUSED.format(acts=lines(acts))}"
  assert ended(program) == ""
  assert not server.called()


def test_a_network_of_its_own_has_nobody_in_it(server):
  script = f"""
import socket, sys
sys.path.insert(0, {str(Path(sandbox.__file__).parent)!r})
import child
print(child.leave_network())
socket.create_connection(("127.0.0.1", {server.port}))
"""
  said = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True
  )
  # Where the kernel does not allow it, it says so; then there is the hook.
  assert said.stdout == f"{not server.called()}\n"


# -----------------------------------------------------------------------------
# What is not the program's fault.


def test_a_python_that_does_not_start_is_an_error(tmp_path, monkeypatch):
  with pytest.raises(RuntimeError, match=r"did not start \(too late\)"):
    ended("x = 1", seconds=1e-4)
  broken = tmp_path / "python"
  broken.write_text("#!/bin/sh\necho no library >&2\nexit 3\n")
  broken.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(broken))
  with pytest.raises(RuntimeError, match=r"\(status 3\): no library$"):
    ended("x = 1")


def test_limits_are_more_than_nothing():
  with pytest.raises(InputError, match=r"limits\.memory: 0 is not allowed"):
    Limits(memory=0)


def test_windows_is_refused(monkeypatch):
  monkeypatch.setattr(sandbox, "os", SimpleNamespace(name="nt"))
  with pytest.raises(InputError, match="on Linux and macOS alone"):
    ended("x = 1")


# -----------------------------------------------------------------------------
# pass@k.


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_pass(samples):
  for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
    draws = list(itertools.combinations(range(samples), k))
    share = sum(min(draw) < passed for draw in draws) / len(draws)
    assert pass_at_k(samples, passed, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_samples_and_of_none():
  assert pass_at_k(200, 10, 1) == pytest.approx(0.05)
  assert 0.999 < pass_at_k(100_000, 1000, 1000) <= 1
  for numbers, field in (((3, 4, 1), "passed"), ((3, 1, 4), "k"),
                         ((3, 1, 0), "k"), ((3, -1, 1), "passed")):  # fmt: skip
    with pytest.raises(InputError, match=f"^{field}: "):
      pass_at_k(*numbers)
