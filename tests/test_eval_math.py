"""eval_math.py: awkward answers, hostile programs, decoding against `generate`, cut runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from models import VOCAB, tiny_model

import eval_math as E
from train_colm import demo_tokenizer

ROOT = Path(__file__).parent.parent

# --------------------------------------------------------------------------------------------------------- strict score

# gold | answers that are right | answers that are wrong, all after "The answer is "; ; separates
STRICT = r"""
3 | 3; 3.0; 3.; $3; 3 apples; 4 - 1 = 3 apples; about 3; **3**; \boxed{3}; x = 3; 2 + 1 = 3; +3; \(3\); \text{3}; 6/2; $3$; 3.0000000001; `3` | 3.4; 2.6; -3; 13; 3 or 4; 3x; 3i; 3,000; less than 3; 3 million; ; 3/0; not 3; 33; 3:4
-4 | -4; −4; - 4; minus 4; negative 4; -\$4; $-4$; -4.0; -8/2; \(-4\) | 4; -4.2; 0; --; -40
2,125 | 2125; $2,125; 2,125.00; 2125 dollars; \$2{,}125; 2,\!125; 2.125 thousand; 2.125e3; 2.125 \times 10^3 | 2; 125; 2.125; 2,1250; 2126; 2125 cents and 3
1000000 | 1,000,000; 1 million; 10^6; 1e6; 1.0e+06; 1000000.0 | 1,000,001; 1000000.9; 1 billion; 10^7; 100000
0 | 0; 0.0; -0; 0/5; \$0; 0 km | 0.0001; O; none; 1e-3
0.5 | 1/2; .5; 0.50; \frac{1}{2}; \frac12; \dfrac{1}{2}; 50%; 50\%; 50 percent; $\frac{1}{2}$; 2/4; \frac 1 2 | 5; 0.05; 1/3; 2; 0.51
\frac{1}{3} | 1/3; 0.333333; 0.3333333333; 2/6; 33.33333333%; \tfrac13; x=\frac{1}{3} | 0.33; 0.3; 3; 1/3 or 2/3; 1/4; 1/30
4.17 | 4.17; 4.1666666667; $4.17; 4.170; 25/6; 25 / 6 = 4.1666666667; 4.17 dollars | 4.2; 4.1; 4; 417; 4.18
.0000672 | 0.0000672; 6.72e-5; 6.72 \times 10^{-5}; 6.72*10**-5 | 0.000067; 0; 6.72; 0.00067
50\% | 50%; 50; 0.5; 1/2; 50 percent; $50\%$ | 5; 500; 0.05; 50.5; 1/5
25 \, \text{km} | 25; 25 km; 25km; 25 kilometers; $25$ \text{km} | 25 m; 25 miles; 250; 25 km^3 or 26
440\text{ cm}^2 | 440; 440 cm^2; 440 square centimeters; 440 \text{ cm}^{2}; 440 cm² | 44; 440 m; 4402
90\text{ square\nunits} | 90; 90 square units; 90 units | 9; 902
1\frac{1}{10} | 1.1; 11/10; 1 1/10; \frac{11}{10}; 1\dfrac{1}{10} | 1/10; 110; 11; 1.11; 1
75^\circ | 75; 75 degrees; 75°; 75^{\circ} | 57; 7.5; 15
\sqrt{109} | \sqrt{109}; $\sqrt{109}$; sqrt(109); 109^{1/2}; 109**(1/2) | 109; 10.4; \sqrt{901}; \sqrt[3]{109}
6\pi+2 | 2 + 6\pi; 6*pi + 2; 2(3\pi+1); 6\pi + 2 | 6\pi; 8\pi; 6\pi - 2; 20
3 + 2 \sqrt{2} | 2\sqrt{2}+3; (1+\sqrt{2})^2; 3+2*sqrt(2); \frac{1}{3-2\sqrt{2}} | 5\sqrt{2}; 3+\sqrt{2}; 3; 3 - 2\sqrt{2}
y = -2x | -2x; y=-2x; y = -2 x; y = -x - x | y = 2x; -2; x = -2y
x=9 | 9; x = 9; 9.0 | y=9; x=-9; 90
2x^2-18 | 2x^2 - 18; 2(x^2-9); 2(x-3)(x+3); 2*x**2 - 18 | 2x^2+18; x^2-9; 2x-18; 2
(-4,13) | (-4,13); (-4, 13); \left(-4,13\right); $(-4, 13)$; -4, 13; (-4.0, 13.0) | (13,-4); [-4,13]; (-4,13]; -4; 4,13; (-4,13,0)
[0,25] | [0,25]; [0, 25]; \left[0,25\right] | (0,25); [0,25); 0, 25; \{0,25\}; [25,0]; 25
(-\infty,3)\cup(3,\infty) | (3,\infty)\cup(-\infty,3); (-\infty, 3) \cup (3, \infty) | (-\infty,3]\cup(3,\infty); (-\infty,\infty); (3,\infty)
3, 5, 7 | 3,5,7; 7, 5, 3; \{3,5,7\}; 3, 5 and 7; [3, 5, 7]; 3, 5, and 7 | 3, 5; 3; 3, 5, 7, 9; 3, 5, 8; 357; 3, 3, 5
3, 5 | 5, 3; [3, 5]; 3 and 5; \{3, 5\}; (3, 5) | 3; 35; [3, 7]; 3, 5, 7
\{1\pm\sqrt{5},-2\} | -2, 1+\sqrt{5}, 1-\sqrt{5}; -2, 1\pm\sqrt{5} | 1\pm\sqrt{5}; -2; 1+\sqrt{5}, -2
\frac{1}{2}, 1, 2 | 0.5, 1, 2; 2, 1, 1/2 | 1, 2; 1/2; 2, 1, 1/3
7, -2, \text{ and } -5 | -5, -2, 7; 7, -2 and -5 | 7, -2; 7, 2, 5
\begin{pmatrix} 1 \\ -2 \end{pmatrix} | \begin{pmatrix} 1 \\ -2 \end{pmatrix}; \begin{pmatrix}1\\-2\end{pmatrix}; \begin{bmatrix} 1 \\ -2 \end{bmatrix} | \begin{pmatrix} -2 \\ 1 \end{pmatrix}; 1
3 + 4i | 3+4i; 4i+3; $3 + 4i$ | 3-4i; 7i; 3; 4+3i
\text{Friday} | Friday; friday; \text{Friday}; Friday. | Monday; F; 5; Fri day or Monday
\text{1:03 PM} | 1:03 PM; 1:03 pm | 1:30 PM; 1:03 AM; 1
\text{(C)} | C; (C); \text{C}; c; $\text{(C)}$ | D; (D); 3; C, D
3032_5 | 3032_5; $3032_5$; 3032_{5} | 3032_6; 3031_5; 3032
-20*x | -20*x; -20x; -20 x; $-20x$ | 20x; -20; -20y; -20*x**2
2^{2005} | 2^{2005}; 2^2005; 4^{1002}*2 | 2^{2004}; 10^{10^{10}}; 4010; 9**9**9**9; \int_0^{10^{10}} x^x dx
"""  # noqa: E501


def cases(table):
    """[gold, answer, verdict] of the lines above."""
    for line in table.strip().splitlines():
        gold, right, wrong = (part.strip() for part in line.split("|"))
        for answers, verdict in ((right, True), (wrong, False)):
            yield from ((gold.replace(r"\nunits", "\nunits"), a.strip(), verdict) for a in answers.split(";"))


def verdicts(rows, score="strict"):
    """[(Row, response)] -> [bool], with one call of the judge for all."""
    records = {(row.task, row.number): {"output": text, "ended": True} for row, text in rows}
    E.score([row for row, _ in rows], records, score == "strict")
    return [records[row.task, row.number][score] for row, _ in rows]


def test_strict_score_of_awkward_answers():
    table = list(cases(STRICT))
    assert len(table) >= 300
    rows = [(E.Row("t", i, "Why?", gold), f"The answer is {answer}.") for i, (gold, answer, _) in enumerate(table)]
    assert [case for case, verdict in zip(table, verdicts(rows), strict=True) if case[2] != verdict] == []


WEB = "The _____ is rough? \nAnswer Choices: (A) web (B) tree"
RESPONSES = [  # task, question, gold, response, paper, strict
    ("numglue", WEB, "B", "The answer is B", True, True),
    ("numglue", WEB, "B", "The answer is (B)", True, True),
    ("numglue", WEB, "B", "The answer is (b) tree.", True, True),
    ("numglue", WEB, "B", "The answer is \\boxed{B}", True, True),
    ("numglue", WEB, "B", "The answer is tree", False, True),
    ("numglue", WEB, "B", "The answer is a tree", False, True),  # paper: option A
    ("numglue", WEB, "A", "The answer is a tree", True, False),
    ("numglue", WEB, "A", "It is a thing. The answer is a rough one.", True, False),
    ("numglue", WEB, "A", "The answer is the web.", False, True),
    ("numglue", WEB, "B", "The answer is (A) or (B)", False, False),
    ("numglue", WEB, "B", "The answer is Option B.", True, True),
    ("numglue", WEB, "B", "Webs are soft.\nSo (B) tree.", True, True),
    ("numglue", "How many?", "12421", "The answer is a total of 12,421 yards.", False, True),
    ("numglue", "When?", "August", "The answer is August.", False, True),
    ("gsm8k", "?", "3", "The answer is 3.4", True, False),  # paper: rounded
    ("gsm8k", "?", "3", "The answer is 2.5000001", True, False),
    ("gsm8k", "?", "3", "#### 3", True, True),
    ("gsm8k", "?", "3", "1 + 2 = 3", True, True),
    ("gsm8k", "?", "3", "He has 2 left and then 3.", True, True),
    ("gsm8k", "?", "3", "", False, False),
    ("gsm8k", "?", "3", "no number", False, False),
    ("gsm8k", "?", "3", "The answer is three", False, False),
    ("gsm8k", "?", "3", "The answer is 4. The answer is 3", True, True),
    ("gsm8k", "?", "3", "The answer is 4.\n\nThe answer is 3", False, True),  # paper: the first paragraph
    ("gsm8k", "?", "3", "The answer is 3\n\n### Instruction:\nWhat is 4?\nThe answer is 4", True, True),
    ("gsm8k", "?", "3", "The answer is 3 or 4", True, False),  # paper: the first number
    ("gsm8k", "?", "3", "the final answer is: 3", True, True),
    ("gsm8k", "?", "3", "Answer: 3 eggs\n", True, True),
    ("gsm8k", "?", "3", "The answer is \\boxed{3}", True, True),
    ("gsm8k", "?", "3", "So \\boxed{3} it is, in 2024", False, True),
    ("gsm8k", "?", "3", "The answer is 3 because 4 - 1 is 3.", True, True),
    ("gsm8k", "?", "3", "The answer is\n3", True, True),
    ("gsm8k", "?", "3", "The answer is 30%", False, False),
    ("gsm8k", "?", "2,125", "The answer is $2,125.00 in total.", True, True),
    ("gsm8k", "?", "2,125", "The answer is 2125 dollars", True, True),
    ("svamp", "?", "0", "The answer is 0.4", True, False),
    ("svamp", "?", "-3", "The answer is -3", True, True),
    ("svamp", "?", "0.5", "The answer is 1/2", True, True),
    ("simuleq", "?", "583.3333", "The answer is 600", True, False),  # paper: within 4 %
    ("simuleq", "?", "583.3333", "The answer is 583.3333333333334", True, True),
    ("simuleq", "?", "583.3333", "The answer is 610", False, False),
    ("simuleq", "?", "12.5", "The answer is 12.1", True, False),
    ("simuleq", "?", "12.5", "The answer is 25/2", True, True),
    ("deepmind", "?", "[2, 3]", "The answer is [2, 3]", False, True),  # paper: no answer can be right
    ("deepmind", "?", "[2, 3]", "The answer is 2 and 3", False, True),
    ("deepmind", "?", "[2, 3]", "The answer is 3, 2", False, True),
    ("deepmind", "?", "[2, 3]", "The answer is 2", False, False),
    ("deepmind", "?", "[3]", "The answer is 3", False, True),
    ("deepmind", "?", "-20*x", "The answer is -20*x", False, True),
    ("deepmind", "?", "-20*x", "The answer is $-20x$", False, True),
    ("deepmind", "?", "-20*x", "The answer is -20", False, False),
    ("deepmind", "?", "12 3 0", "The answer is 12 3 0", False, True),
    ("deepmind", "?", "12 3 0", "The answer is 12, 3, 0", False, True),
    ("deepmind", "?", "12 3 0", "The answer is 0, 3, 12", False, False),
    ("deepmind", "?", "12 3 0", "The answer is 1230", False, False),
    ("math", "?", "\\frac{1}{2}", "The answer is $\\frac{1}{2}$", False, True),  # paper: dollar signs stay
    ("math", "?", "\\frac{1}{2}", "The answer is 1/2", True, True),
    ("math", "?", "\\frac{1}{2}", "The answer is 0.5", True, True),
    ("math", "?", "\\frac{1}{2}", "The answer is 0.51", True, False),
    ("math", "?", "\\frac{1}{2}", "So it is $\\boxed{\\frac12}$.", True, True),
    ("math", "?", "3\\sqrt{2}", "The answer is \\sqrt{18}", False, True),
    ("math", "?", "3\\sqrt{2}", "The answer is 3\\sqrt2", True, True),
    ("math", "?", "10,\\!236", "The answer is 10,236", True, True),
    ("math", "?", "(2,\\infty)", "The answer is (2, \\infty)", True, True),
    ("math", "?", "(2,\\infty)", "The answer is [2,\\infty)", False, False),
    ("math", "?", "17\\text{ meters}", "The answer is 17", True, True),
    ("math", "?", "17\\text{ meters}", "The answer is 17 \\text{ feet}", True, False),
    ("math", "?", "44\\%", "The answer is 44", True, True),
    ("math", "?", "x=9", "The answer is 9", True, True),
    ("math", "?", "3", "So we get 3", True, True),
    ("math", "?", "2, .5", "The answer is 2, 0.5", True, True),
    (
        "math",
        "?",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        "The answer is \\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}",
        True,
        True,
    ),
    ("mine", "?", "5", "The answer is a 5", True, True),
    ("mine", "Options: (A) 3 (B) 5", "B", "The answer is 5", False, True),
]


def test_both_scores_of_whole_responses():
    rows = [(E.Row(task, i, question, gold), text) for i, (task, question, gold, text, _, _) in enumerate(RESPONSES)]
    for place, name in ((4, "paper"), (5, "strict")):
        got = verdicts(rows, name)
        assert [(name, case) for case, verdict in zip(RESPONSES, got, strict=True) if case[place] != verdict] == []


SAMPLES = {  # a row or two of each set, as its file has them
    "gsm8k": [{"question": "Cost?", "answer": "80+50=$<<80+50=130>>130\n#### 2,130"}],
    "svamp": [{"Body": "He has 3.0 pens.", "Question": "How many?", "Equation": "", "Answer": 51.0, "ID": "1"}],
    "numglue": [
        {"question": WEB, "answer": "B", "type": "Type_3"},
        {"question": "?", "answer": 1536, "type": "Type_2"},
    ],
    "simuleq": [{"question": "?", "answer": "583.3333"}],
    "deepmind": [{"question": "?", "answer": a} for a in ("[2, 3]", "-20*x", "12 3 0", "-0.26")],
    "math": [{"problem": "?", "solution": "", "answer": a.split("|")[0].strip()} for a in STRICT.strip().splitlines()],
}


@pytest.mark.parametrize("task", E.FILES)
def test_gold_answers_are_right(task, tmp_path):
    folder = Path(os.environ.get("COLM_MATH_EVAL", tmp_path))
    if folder == tmp_path:
        (folder / E.FILES[task]).write_text("\n".join(map(json.dumps, SAMPLES[task])))
    rows = E.read_task(task, E.argparse.Namespace(data_dir=str(folder), max_rows=None))
    assert all(verdicts([(row, f"Thus.\nThe answer is {row.gold}.") for row in rows]))
    assert all(verdicts([(row, f"Thus $\\boxed{{{row.gold}}}$.") for row in rows]))
    assert task != "gsm8k" or all(verdicts([(row, f"The answer is {row.gold}") for row in rows], "paper"))


@pytest.mark.parametrize(
    "text", ["9" * 5000, "(" * 3000, "{" * 3000, "\\frac" * 900, "1,111" * 900, "a" * 4000 + "=" * 99]
)
def test_long_answers_are_read_in_little_time(text):
    start = time.perf_counter()
    for response in (text, "The answer is " + text, "\\boxed{" + text):
        E.strict_verdict("math", "?", response, "3")
        E.paper_correct("math", response, "3")
        E.paper_correct("gsm8k", response, "3")
    assert time.perf_counter() - start < 2


# ------------------------------------------------------------------------------------------------------------- programs

HOSTILE = {  # name: program, status
    "loops": ("while True: pass", "timeout"),
    "sleeps": ("import time; time.sleep(60)", "timeout"),
    "ignores signals": (
        "import signal\nfor s in (24, 15, 2): signal.signal(s, signal.SIG_IGN)\nwhile 1: pass",
        "timeout",
    ),
    "backtracks": ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", "timeout"),
    "catches everything": ("while True:\n  try: raise MemoryError\n  except BaseException: pass", "timeout"),
    "a huge power": ("print(10 ** 10 ** 10)", "timeout"),
    "a huge string": ("print(len('a' * 10**11))", "memory"),
    "a growing list": ("x = []\nwhile True: x.append(bytes(10**7))", "memory"),
    "a huge array": ("import numpy; print(numpy.ones(10**11).sum())", "memory"),
    "an endless file": ("print(len(open('/dev/zero', 'rb').read()))", "memory"),
    "prints without end": ("while True: print('x' * 1000)", "output"),
    "prints at once": ("print('x' * 10**8)", "output"),
    "complains without end": ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "output"),
    "forks": ("import os\nwhile True: os.fork()", "refused"),
    "threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        "refused",
    ),
    "runs a command": ("import subprocess; print(subprocess.run(['ls']))", "refused"),
    "becomes a shell": ("import os; os.execv('/bin/sh', ['sh', '-c', 'sleep 60'])", "refused"),
    "starts a pool": ("from multiprocessing import Pool; print(Pool(2).map(abs, [1]))", "refused"),
    "leaves the group": ("import os; os.setsid()", "refused"),
    "kills the evaluator": ("import os; os.kill(os.getppid(), 9)", "refused"),
    "kills everyone": ("import os; os.kill(-1, 9)", "refused"),
    "writes a file": ("open('x', 'w').write('x')", "refused"),
    "fills the disk": (
        "i = 0\nwhile True:\n  open(f'/tmp/eval_math_{i}', 'wb').write(bytes(10**8))\n  i += 1",
        "refused",
    ),
    "fills memory files": ("import os; os.memfd_create('x')", "refused"),
    "removes a file": ("import os; os.remove('in')", "refused"),
    "makes a folder": ("import os; os.mkdir('x')", "refused"),
    "changes modes": ("import os; os.chmod('.', 0o777)", "refused"),
    "opens a socket": ("import socket; socket.create_connection(('127.0.0.1', 80))", "refused"),
    "fetches a page": ("import urllib.request as u; print(u.urlopen('http://127.0.0.1'))", "refused"),
    "reads the environment": ("import os; print(open(f'/proc/{os.getppid()}/environ').read())", "refused"),
    "reads memory": ("import os; print(open(f'/proc/{os.getppid()}/mem', 'rb').read(9))", "refused"),
    "raises its limits": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "refused"),
    "forks below libc": ("import ctypes as c, os; c.CDLL(None).syscall(57) >= 0 or os.getpgid(0)", "refused"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "killed"),
    "recurses": ("def f(): f()\nf()", "error"),
    "waits for input": ("print(input())", "error"),
    "exits": ("import sys; print(1); sys.exit(3)", "error"),
    "is broken": ("print(1", "error"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every hostile program, two at a time."""
    E.tempfile.tempdir = str(tmp_path_factory.mktemp("programs"))
    with E.ThreadPoolExecutor(2) as pool:
        run = lambda case: E.run_program(case[0], seconds=3, megabytes=512)  # noqa: E731
        return dict(zip(HOSTILE, pool.map(run, HOSTILE.values()), strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_is_contained(results, name):
    assert results[name].status == HOSTILE[name][1], results[name]
    assert len(results[name].output) <= 2**16


def test_nothing_is_left_of_hostile_programs(results, capsys):
    assert not list(Path(E.tempfile.gettempdir()).iterdir())
    E.check_programs()
    assert capsys.readouterr().err == ""


def test_the_evaluator_in_reach_is_warned_of(monkeypatch, capsys):
    monkeypatch.setattr(E, "run_program", lambda source: E.Result("ok", "", ""))
    E.check_programs()
    assert "warning: this system lets programs read the evaluator's environment" in capsys.readouterr().err


def test_programs_compute_without_our_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert E.run_program("import os; print(sorted(os.environ))").output.count("TOKEN") == 0
    solve = "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 4, x))\n"
    solve += "import numpy as np\nprint(np.arange(3) @ np.eye(3))"
    assert E.run_program(solve).output.splitlines() == ["[-2, 2]", "[0. 1. 2.]"]
    assert E.run_program("import math\nprint(math.pi, 'é')").output == "3.141592653589793 é"


@pytest.mark.parametrize(
    "text, program",
    [
        ("x = 3\nprint(x)", "x = 3\nprint(x)"),
        ("Sure:\n```python\nprint(3)\n```\nIt prints 3.", "print(3)"),
        ("```\nprint(3)", "print(3)"),
        ("print(3)\n\n### Instruction:\nNext", "print(3)"),
        ("The answer is 3.", ""),
    ],
)
def test_program_in_a_response(text, program):
    assert E.program_in(text) == program


# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "phi", "gpt2", "gpt_neox"])
def test_batched_decoding_equals_one_at_a_time(kind):
    model = tiny_model(kind, lora=False)
    stop, max_new, generator = {2, 5, 11, 23, 31}, 20, torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (24,), generator=generator).tolist()
    prompts = [torch.randint(40, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    queue = deque(E.Request(E.Row("t", i, "", ""), prompt) for i, prompt in enumerate(prompts))
    batch = E.Batch(model, 250, max_new, stop)  # about four rows at once: they come and go
    got = {}
    while queue or batch.requests:
        got |= {r.row.number: r.tokens for r in batch.step(queue)}
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": max_new, "eos_token_id": sorted(stop), "pad_token_id": 0, "do_sample": False}
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert got[i] == alone[0, len(prompt) :].tolist()
    assert len({len(tokens) for tokens in got.values()}) > 1


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A random Llama that ends its answers now and then, an adapter of it, and questions."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("eval_math")
    tokenizer = demo_tokenizer()
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=512, initializer_range=0.5, eos_token_id=0, bos_token_id=0, **sizes)
    )
    model.generation_config.eos_token_id = [0, *range(300, 320)]
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "model")
    lora = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model.name_or_path = str(folder / "model")
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    rows = [{"question": f"Add {i} and {i % 7}." * (1 + i % 3), "answer": str(i)} for i in range(120)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def flags(home, out, *more):
    task = ["--tasks", str(home / "sums.jsonl"), "--max_new_tokens", "24", "--max_tokens_per_batch", "800"]
    return ["--model", str(home / "model"), *task, "--output_dir", str(home / out), *more]


def launch(home, out, *more, processes=1):
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *start, str(ROOT / "eval_math.py"), *flags(home, out, *more)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def whole(home):
    """results.json and predictions of a run that nothing disturbed."""
    E.main(flags(home, "whole"))
    return [(home / "whole" / name).read_text() for name in ("results.json", "predictions.jsonl")]


def test_results_hold_counts_intervals_settings_and_versions(whole):
    results, lines = json.loads(whole[0]), whole[1].splitlines()
    task = results["tasks"]["sums"]
    assert task["rows"] == len(lines) == 120 and 0 < task["unended"] < 120
    low, high = task["strict"]["interval"]
    assert low <= task["strict"]["score"] == round(100 * task["strict"]["correct"] / 120, 2) <= high
    assert results["settings"]["max_new_tokens"] == 24 and results["versions"]["torch"] == torch.__version__
    assert E.wilson(0, 20) == [0.0, 16.11] and E.wilson(10, 20) == [29.93, 70.07]


def test_a_killed_run_goes_on(home, whole):
    child, file = launch(home, "killed"), home / "killed" / "predictions-0.jsonl"
    while not (file.exists() and file.read_text().count("\n") > 5) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert 5 < file.read_text().count("\n") < 120
    with file.open("a") as f:
        f.write('{"task": "sums", "row": 1')  # cut short
    E.main(flags(home, "killed"))
    assert [(home / "killed" / name).read_text() for name in ("results.json", "predictions.jsonl")] == whole


def test_two_processes_give_what_one_gives(home, whole):
    child = launch(home, "two", processes=2)
    printed = child.communicate()[0]
    assert child.returncode == 0 and "sums" in printed, printed
    assert [(home / "two" / name).read_text() for name in ("results.json", "predictions.jsonl")] == whole


def test_programs_run_and_rows_without_an_answer_are_asked_again(home, monkeypatch):
    programs = ["print(3)", "while True: print", "print(1 / 0)", "", "print('')", "print('1' * 10**6)"]
    monkeypatch.setattr(E, "program_in", lambda text: programs[len(text) % len(programs)])
    more = ("--mode", "pot", "--execute_programs", "--program_seconds", "0.7", "--max_rows", "30")
    runs = {}
    for out, backup in (("pot", []), ("backup", ["--cot_backup"])):
        E.main(flags(home, out, *more, *backup))
        runs[out] = [json.loads(line) for line in (home / out / "predictions.jsonl").read_text().splitlines()]
        assert [r["row"] for r in runs[out]] == list(range(30))
    counts = json.loads((home / "pot" / "results.json").read_text())["tasks"]["sums"]["programs"]
    assert sum(counts.values()) == 30 and {"ok", "timeout", "error", "none", "output"} >= set(counts) >= {"ok", "error"}
    for pot, backup in zip(runs["pot"], runs["backup"], strict=True):
        answered = bool(pot.get("printed"))
        assert ("program_text" in backup) != answered and pot["program"] == backup["program"]
        assert not answered or (pot["answer"] == "3" and pot["program"] == "ok")


def test_an_adapter_is_scored_on_its_base(home):
    E.main([*flags(home, "adapter", "--max_rows", "5"), "--model", str(home / "adapter")])
    base, adapter = ((home / out / "predictions.jsonl").read_text().splitlines()[0] for out in ("whole", "adapter"))
    assert json.loads(base)["output"] != json.loads(adapter)["output"]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "more, message",
    [
        (["--tasks", "gms8k"], "gms8k is unknown: choose of gsm8k, math, numglue, svamp, deepmind, simuleq"),
        (["--tasks", "gsm8k"], "data/gsm8k.jsonl does not exist"),
        (["--tasks", "svamp", "--data_dir", "nowhere"], "nowhere/svamp.json does not exist"),
        (["--tasks", "HOME/broken.jsonl"], "broken.jsonl line 2: broken JSON"),
        (["--tasks", "HOME/noanswer.jsonl"], "noanswer.jsonl line 1 has no field 'answer'"),
        (["--tasks", "HOME/list.json"], "list.json row 1: field 'answer' is .* must be a text or a number"),
        (["--tasks", "HOME/number.jsonl"], "number.jsonl line 1 has no field 'question'"),
        (["--tasks", "HOME/sums.jsonl", "HOME/sums.jsonl"], "names a task twice"),
        (["--output_dir", "HOME/whole", "--max_rows", "3"], "max_rows is 3, but .*whole holds a run with None"),
        (["--output_dir", "HOME/whole", "--max_new_tokens", "9"], "max_new_tokens is 9, but .* with 24"),
        (["--mode", "pot"], "allow it with --execute_programs"),
        (["--cot_backup"], "--cot_backup has no effect"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0 is out of range"),
        (["--max_new_tokens", "4000"], "leaves no room for a prompt"),
        (["--model", "HOME/nothing"], "--model .*nothing: .*: give a causal LM's folder"),
        (["--model", "HOME/orphan"], "--model .*orphan: .*: its base is /gone, name another folder with --base_model"),
        (["--tasks", "HOME/none.json"], "none.json holds no rows"),
        (["--beam", "4"], "unrecognized arguments: --beam 4"),
    ],
)
def test_bad_input_is_one_line(home, whole, capsys, more, message):
    (home / "broken.jsonl").write_text('{"question": "?", "answer": 1}\n{"question": ')
    (home / "noanswer.jsonl").write_text('{"question": "?"}')
    (home / "list.json").write_text('[{"question": "?", "answer": [1]}]')
    (home / "number.jsonl").write_text("3")
    (home / "none.json").write_text("[]")
    (home / "orphan").mkdir(exist_ok=True)
    config = json.loads((home / "adapter" / "adapter_config.json").read_text())
    (home / "orphan" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(SystemExit) as end:
        E.cli(flags(home, "bad", *(x.replace("HOME", str(home)) for x in more)))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and re.search(f"^error: .*{message}", line)


def test_a_gpu_that_is_too_small_is_one_line(home, monkeypatch, capsys):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(E.Batch, "step", step)
    with pytest.raises(SystemExit) as stopped:
        E.cli(flags(home, "small"))
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stopped.value.code == 2 and "--max_tokens_per_batch 800 takes more memory than the GPU has free" in line


def test_without_a_filter_no_program_runs_and_the_strict_score_is_left_out(home, monkeypatch, capsys):
    monkeypatch.setattr(E, "filter_code", bytes)
    assert E.run_program("print(1)")[:2] == ("error", "")
    with pytest.raises(SystemExit):
        E.cli(flags(home, "vax", "--mode", "pot", "--execute_programs"))
    assert "error: --execute_programs needs Linux on x86_64 (OSError: the kernel" in capsys.readouterr().err
    E.main(flags(home, "vax", "--max_rows", "2"))
    assert "no strict score: it needs Linux and pip install 'math-verify" in capsys.readouterr().out
    assert "strict" not in json.loads((home / "vax" / "results.json").read_text())["average"]
