r"""Is an answer right? Two scores for mathematics, and the cage that programs and comparisons run in.

    >>> paper_correct("gsm8k", "The answer is 3.4", "3")  # the scorer behind the tables of arXiv 2407.19580v4
    True
    >>> strict_scores([("gsm8k", "?", "The answer is 3.4", "3"), ("math", "?", "So $\\boxed{0.5}$.", "\\frac{1}{2}")])
    [False, True]
    >>> run_program("print(6 * 7)").output
    '42'

*paper* is the MathInstruct scorer, faults included: exact string, integers after rounding, other numbers within 4 %.
*strict* asks for the same value: numbers, units, options, lists and intervals here, any other LaTeX by math-verify.
Model text is never evaluated in this process; math-verify parses it in the cage, for 10^{10^{10}} is hard to stop.

The cage is an interpreter of its own, whose system calls are filtered: it may compute, read files and print. It can't
write, fork, signal, trace or open a socket; kernel limits bound its time, memory and output. Standard library only.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import re
import signal
import struct
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

# ---------------------------------------------------------------------------------------------------- the paper's score


def paper_number(text: str) -> float | None:
    """The value of a decimal or a fraction; the official scorer calls eval here."""
    text = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text) if "frac" in text else text.replace(",", "")
    top, _, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def without_zeros(text: str) -> str:
    try:
        return f"{int(float(text))}" if float(text).is_integer() else str(float(text))
    except (ValueError, OverflowError):
        return text


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds."""
    rest = text.rpartition("boxed")[2] if "boxed" in text else ""
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for i, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:i]
    return rest[1:]


def paper_math_string(text: str) -> str:
    """The string that MATH answers are compared by: units, spaces and spellings of fractions and roots removed."""
    text = re.sub(r"\n|\\!|\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$|\\%", "", text.replace("\\\\", "\\"))
    text = re.sub(r"[td]frac", "frac", text).split("\\text{ ")[0]
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def paper_answer(task: str, text: str, options: bool) -> str:
    """The answer that the official scorer reads out of a response."""
    if task == "math":
        parts = re.split("[Tt]he answer is ", text)
        found = re.findall(r"-?\d*\.?\d+", text) or [""]
        answer = parts[-1].strip() if len(parts) > 1 else (boxed(text) or "") if "boxed" in text else found[-1]
        answer = paper_math_string(answer.removesuffix(".").removesuffix("/"))
        return paper_math_string(boxed(answer) or "") if "boxed" in answer else answer
    if max(text.count("####"), text.count("The answer is")) > 1:
        text = text.split("\n\n")[0]
    parts = re.split("####|The answer is", text)
    answer = parts[-1].split("=")[-1]
    found = re.findall(r"\b[A-E]\b", answer.upper()) if options else []  # the article "a" is read as option A
    found = found or [without_zeros(x) for x in re.findall(r"-?\d+/?\.?\d*", answer.replace(",", ""))] or [""]
    return found[0 if len(parts) > 1 else -1].removesuffix(".").removesuffix("/")


def paper_correct(task: str, text: str, gold: str) -> bool:
    answer = paper_answer(task, text, task == "numglue" or gold in list("ABCDE"))
    gold = paper_math_string(gold) if task == "math" else without_zeros(gold.replace(",", ""))
    if answer == gold:
        return True
    target, number = paper_number(gold), paper_number(answer)
    if target is None or number is None:
        return False
    return round(number) == target if target.is_integer() else abs(number - target) <= 0.04 * abs(target)


# ----------------------------------------------------------------------------------------------------- the strict score

SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
KINDS_OF_UNITS = (
    "mm millimeter|cm centimeter|m meter metre|km kilometer|in inch inche|ft foot feet|yd yard|mi mile|mg milligram|"
    "g gram|kg kilogram|lb pound|oz ounce|s sec second|min minute|h hr hour|day|week|month|year|cent|dollar $|l liter"
)
UNITS = {word: kind for kind, words in enumerate(KINDS_OF_UNITS.split("|")) for word in words.split()}
NOT_UNITS = r"pi|sqrt|log|ln|sin|cos|tan|exp|not|no|less|more|least|most|than|over|under|between|times|squared|cubed"
MANTISSA = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?"
POWER = r"(?: ?(?:e|(?:\*|×|x|\\times|\\cdot) ?10 ?(?:\^|\*\*) ?)[{(]?([-+]?\d{1,3})[)}]?)?"
NUMBER = re.compile(rf"([-+]?) ?([$€£]?)([-+]?)(?:(?:(\d+)[ -])?(\d+) ?/ ?(\d+)|({MANTISSA}){POWER})( ?%)?", re.I)


def plain(text: str) -> str:
    """LaTeX dress taken off: x = \\dfrac{1}{2}\\text{ cm} becomes x = 1/2 cm."""
    text = re.sub(r"(?<!\\)\$([^$]*[^$\\])\$", r"\1", text.replace("−", "-").replace("–", "-"))
    text = re.sub(r"(?<!\\)\\[()\[\]]|\\!|(?<!\\)\$(?!\d)|\*\*(?=\s|$)|^\*\*|`", "", text)
    text = re.sub(r"\\left|\\right(?!arrow)|\^\{?\\circ\}?|°", "", text.replace("\\$", "$").replace("{,}", ","))
    text = re.sub(r"(?<!\\)\\[,;: ]|~", " ", re.sub(r"\\[td]frac", r"\\frac", text))
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\s*(\d|\{\s*-?\d+\s*\})\s*(\d|\{\s*\d+\s*\})", r" \1/\2 ", text)
    text = re.sub(r"\{\s*(-?\d+)\s*\}/", r"\1/", re.sub(r"/\{\s*(\d+)\s*\}", r"/\1", text))
    text = re.sub(r"- +(?=\d)|\b(?:negative|minus) ", "-", re.sub(r"\\%| percent\b", "%", text))
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def key(text: str) -> str:
    """Texts of equal keys are equal."""
    text = re.sub(r"_\{(\w+)\}", r"_\1", re.sub(r"\s", "", text).casefold().strip(".:"))
    return re.sub(r"^\(([a-z])\)$", r"\1", text)


@dataclass
class Number:
    value: Fraction
    percent: bool
    decimals: int
    unit: int | None


def number_of(text: str) -> Number | None:
    """The number that a text states: bare, with a unit, or among words, as long as no other one stands beside it."""
    text = re.sub(r"(?<=[a-z])(?:\^\{?[23]\}?|[²³])", "", text)
    found = [m for m in NUMBER.finditer(text) if re.search(r"\d", m[0])]
    if len(found) != 1:
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    words = f"{before} {after}".lower()
    if re.search(r"[^a-z\s.,:;'\"!?’-]", words) or re.search(rf"\b(?:{NOT_UNITS})\b", words):
        return None
    if re.match(r"[a-zA-Z](?![a-zA-Z])| [a-fh-kn-z](?![a-z])", after) or re.search(r"-\s*$", before):
        return None  # 3x and 3 x are no numbers
    sign, dollar, inner, whole, top, bottom, digits, power, percent = found[0].groups()
    try:
        value = Fraction(int(top), int(bottom)) + int(whole or 0) if top else Fraction(digits.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
    for word in (after.split() or [""])[:1]:
        value *= SCALES.get(word.lower(), 1)
    value *= Fraction(10) ** int(power or 0) * (-1 if "-" in (sign, inner) else 1)
    known = [UNITS[w] for w in re.findall(r"[a-z]+", after.lower()) for w in (w, w.rstrip("s")) if w in UNITS]
    decimals = len(digits.partition(".")[2]) if digits and not power else 0
    return Number(value, bool(percent), decimals, known[0] if known else UNITS["$"] if dollar else None)


def same_number(a: Number, gold: Number) -> bool:
    if None not in (a.unit, gold.unit) and a.unit != gold.unit:
        return False
    values = [a.value] if a.percent == gold.percent else [a.value, a.value / 100 if a.percent else a.value * 100]
    if gold.decimals >= 2:  # a gold answer of two decimals or more was rounded to them
        values += [Fraction(round(v, gold.decimals)) for v in values]
    room = min(abs(gold.value) * Fraction(2, 10**6), Fraction(1, 1000))  # what printing a float loses
    return any(abs(v - gold.value) <= (room if v.denominator > 1 or gold.value.denominator > 1 else 0) for v in values)


def items(text: str) -> tuple[str, list[str]]:
    """The brackets and items of a list, set, tuple or interval; one item of a text that is none."""
    text = re.sub(r",? (?:and|or) |;", ", ", text.replace("\\{", "{").replace("\\}", "}"))
    if re.fullmatch(r"-?\d+(?: -?\d+)+", text):
        return "()", text.split()  # DeepMind's sorted lists
    brackets, depth, start, parts = "", 0, 0, []
    if text[:1] in "([{" and text[-1:] in ")]}" and len(text) > 1:
        depths = [sum((c in "([{") - (c in ")]}") for c in text[: i + 1]) for i in range(len(text) - 1)]
        if min(depths) > 0:
            brackets, text = text[0] + text[-1], text[1:-1].strip()
    comma = ", " if re.search(r"\d,\d{3}(?!\d)", text) and ", " in text else ","
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and text.startswith(comma, i):
            parts, start = [*parts, text[start:i]], i + 1
    parts = [part.strip() for part in [*parts, text[start:]] if part.strip()]
    both = [[p.replace("\\pm", "+", 1), p.replace("\\pm", "-", 1)] if "\\pm" in p else [p] for p in parts]
    return brackets, [part for pair in both for part in pair]


def same(answer: str, gold: str, judge) -> bool:
    """Does an answer have the gold answer's value? `judge(answer, gold)` decides on expressions."""
    if key(answer) == key(gold):
        return bool(key(gold))
    if re.search(r"\d_", gold + answer):
        return False  # numbers in other bases are texts here
    names = [re.fullmatch(r"([A-Za-z]) ?(?:=|\\in) ?([^=]+)", text) for text in (answer, gold)]
    if all(names) and names[0][1] != names[1][1]:
        return False
    answer, gold = (name[2] if name else text for name, text in zip(names, (answer, gold), strict=True))
    if "=" in answer and "=" not in gold:
        answer = answer.rpartition("=")[2].strip()
    numbers = number_of(answer), number_of(gold)
    if None not in numbers:
        return same_number(*numbers)
    if "\\cup" in gold or "\\cup" in answer:
        return same_items(answer.split("\\cup"), gold.split("\\cup"), False, judge)
    (brackets, parts), (gold_brackets, gold_parts) = items(answer), items(gold)
    if max(len(parts), len(gold_parts)) > 1 or gold_brackets == "{}":
        free = gold_brackets in ("", "{}")  # an answer may list a set in any brackets and order
        fits = free or brackets == gold_brackets or (gold_brackets == "()" and not brackets)
        return fits and same_items(parts, gold_parts, not free, judge)
    if any(map(number_of, (answer, gold))) and not re.search(r"[\d\\]", answer if numbers[1] else gold):
        return False  # a number against words
    return judge(answer, gold)


def same_items(parts: list[str], gold: list[str], ordered: bool, judge) -> bool:
    if len(parts) != len(gold) or len(gold) > 20:
        return False
    table = [[same(p.strip(), g.strip(), judge) for p in parts] for g in gold]  # complete: the judge notes every pair
    if ordered:
        return all(line[i] for i, line in enumerate(table))
    left = set(range(len(parts)))
    for line in table:
        match = next((i for i in sorted(left) if line[i]), None)
        if match is None:
            return False
        left.remove(match)
    return True


def strict_answer(text: str) -> str:
    """The last answer that a response states, else its last box, else its last number or line."""
    text = text.split("### Instruction")[0][-4000:].strip()
    parts = re.split(r"####|\banswer is\b ?:?|\banswer ?:", text, flags=re.I)
    if len(parts) == 1:
        if (inside := boxed(text)) is not None:
            return plain(inside)[:400]
        last = text.rpartition("\n")[2]
        found = [m[0] for m in NUMBER.finditer(text) if re.search(r"\d", m[0])]
        return plain(last) if re.search(r"\([A-F]\)", last) or not found else plain(found[-1].strip())
    answer = ""
    for line in parts[-1].strip().split("\n"):
        answer += line + "\n"
        if answer.count("{") <= answer.count("}") and answer.count("\\begin") <= answer.count("\\end"):
            break
    answer = boxed(answer) if "boxed" in answer and boxed(answer) else answer
    return plain(re.split(r"\.\s|\bbecause\b|\bsince\b|, so\b", answer.strip() + " ")[0])[:400]


def options_of(question: str) -> dict[str, str]:
    listed = re.split(r"Answer Choices:|Options:", question)
    parts = re.split(r"\(([A-F])\)", listed[-1][:2000]) if len(listed) > 1 else [""]
    return {letter: key(text.strip(" ,\n")) for letter, text in zip(parts[1::2], parts[2::2], strict=True)}


def chosen(answer: str, options: dict[str, str]) -> str | None:
    """The option that an answer names, by its text or its letter; "a web" names the web, not option A."""
    words = key(re.sub(r"^(?:a|an|the) ", "", answer, flags=re.I))
    named = [letter for letter, text in options.items() if text and words == text]
    letters = set(re.findall(r"\(([A-F])\)", answer))
    alone = re.fullmatch(r"(?:option |choice )?\(?([A-F])\)?(?:[.:)] ?.*)?", answer, re.I)
    return named[0] if named else letters.pop() if len(letters) == 1 else alone[1].upper() if alone else None


def strict_correct(task: str, question: str, text: str, gold: str, judge) -> bool:
    """Does a response state the gold answer's value? `judge(answer, gold)` decides on expressions."""
    answer, options = strict_answer(text), options_of(question)
    if gold in options:
        return chosen(answer, options) == gold
    gold = re.sub(r"^\[(.*)\]$", r"{\1}", gold) if task == "deepmind" else gold  # prime factors are a set
    return same(answer, plain(gold), judge)


def strict_scores(cases: list[tuple[str, str, str, str]]) -> list[bool]:
    """Verdicts on (task, question, response, gold). The rules run twice: first to list what the judge has to decide."""
    pairs: dict[tuple[str, str], bool] = {}
    for case in cases:
        strict_correct(*case, lambda *pair: pairs.setdefault(pair, False))
    pairs = compare(list(pairs))
    return [strict_correct(*case, lambda *pair: pairs[pair]) for case in cases]


def latex(text: str) -> str:
    """Python's spelling of formulas as LaTeX: 3*sqrt(x)**2 is 3 \\cdot \\sqrt{x}^2."""
    text = re.sub(r"(?<![\\a-zA-Z])(?:math\.|sympy\.)?sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])pi\b", r"\\pi", text.replace("**", "^"))
    return re.sub(r"\^\(([^()]*)\)", r"^{\1}", text).replace("*", r" \cdot ")


JUDGE = """
import json, logging, signal, sys
from math_verify import LatexExtractionConfig, parse, verify
logging.disable()
def value(text):
    return parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None)
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, 3)  # CPU seconds; ends this process, and the pair it was at is unequal
    try:
        answer, gold = map(value, json.loads(line))
        print(int(bool(answer and gold and verify(gold, answer, timeout_seconds=None))), flush=True)
    except Exception:
        print(0, flush=True)
"""


def compare(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], bool]:
    """math-verify's verdicts, from caged processes: a comparison that hangs or bursts ends one, the next goes on."""
    verdicts: list[bool] = []
    lines = [json.dumps([latex(text)[:400] for text in pair]) for pair in pairs]
    while len(verdicts) < len(pairs):
        rest = lines[len(verdicts) : len(verdicts) + 500]
        result = run_program(JUDGE, "\n".join(rest), seconds=3000, megabytes=2048)
        if result.status in ("error", "refused"):  # at its imports: what comes later is caught
            raise CageError(f"--strict: math-verify can't run ({result.error}): mend it, or give --no-strict")
        verdicts += [line == "1" for line in result.output.split()] + [False] * (result.status != "ok")
    return dict(zip(pairs, verdicts, strict=True))


# ------------------------------------------------------------------------------------------------------------ programs

# What a computing interpreter asks of the kernel: name, number on x86_64, number on aarch64 (-1: has none). All else,
# with every fork, exec, socket, signal, trace and change of files, is refused. 439 is faccessat2 on both.
SYSCALLS = """read 0 63 write 1 64 close 3 57 stat 4 -1 fstat 5 80 lstat 6 -1 poll 7 -1 lseek 8 62 mmap 9 222
mprotect 10 226 munmap 11 215 brk 12 214 rt_sigaction 13 134 rt_sigprocmask 14 135 rt_sigreturn 15 139 pread64 17 67
readv 19 65 writev 20 66 access 21 -1 select 23 -1 sched_yield 24 124 mremap 25 216 madvise 28 233 nanosleep 35 101
setitimer 38 103 getpid 39 172 exit 60 93 uname 63 160 getcwd 79 17 readlink 89 -1 gettimeofday 96 169
getrusage 98 165 sysinfo 99 179 times 100 153 getuid 102 174 getgid 104 176 geteuid 107 175 getegid 108 177
getppid 110 173 sigaltstack 131 132 gettid 186 178 time 201 -1 futex 202 98 sched_getaffinity 204 123 getdents64 217 61
restart_syscall 219 128 clock_gettime 228 113 clock_getres 229 114 clock_nanosleep 230 115 exit_group 231 94
newfstatat 262 79 readlinkat 267 78 faccessat 269 48 pselect6 270 72 ppoll 271 73 set_robust_list 273 99
getrandom 318 278 membarrier 324 283 statx 332 291 rseq 334 293 faccessat2 439 439"""
OPEN = {"x86_64": [(2, 1), (257, 2)], "aarch64": [(56, 2)]}  # open and openat, and which argument holds their flags
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def filter_code() -> bytes:
    """A seccomp program in BPF: SYSCALLS and open to read are allowed, the rest gets EPERM. Empty where it can't be."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in AUDIT:
        return b""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    code = [(load, 0, 0, 4), (equal, 1, 0, AUDIT[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    for number in map(int, SYSCALLS.split()[1 + (machine == "aarch64") :: 3]):
        code += [(equal, 0, 1, number), (give, 0, 0, allow)] if number >= 0 else []
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    for number, place in OPEN[machine]:
        flags = [(load, 0, 0, 16 + 8 * place), (any_bit, 0, 1, writes), (give, 0, 0, refuse), (give, 0, 0, allow)]
        code += [(equal, 0, 4, number), *flags]
    return b"".join(struct.pack("HBBI", *line) for line in [*code, (give, 0, 0, refuse)])


def cage():
    """Give up every power, then run a program: the child interpreter is given this function's source."""
    import contextlib, ctypes, io, json, os, resource, struct, sys  # noqa: E401, I001

    given = json.load(sys.stdin)
    for name, limit in given["limits"].items():
        with contextlib.suppress(ValueError, OSError):  # macOS has no RLIMIT_AS
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), limit)
    if code := bytes.fromhex(given["filter"]):
        libc = ctypes.CDLL(None)
        libc.unshare(0x10000000 | 0x40000000 | 0x08000000)  # user, network and IPC namespaces, where they are allowed
        libc.capset(
            struct.pack("Ii", 0x20080522, 0), bytes(24)
        )  # fewer capabilities than the evaluator: can't trace it
        libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: killed with the evaluator
        if os.getppid() != given["parent"]:
            sys.exit("OSError: the evaluator is gone")
        buffer = ctypes.create_string_buffer(code)
        program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
        if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
            sys.exit("OSError: the kernel refuses to filter system calls")
    sys.stdin, sys.argv = io.StringIO(given["data"]), ["program"]
    exec(compile(given["source"], "<program>", "exec"), {"__name__": "__main__"})


class CageError(Exception):
    """Programs can't run here at all."""


@dataclass
class Result:
    status: str  # ok, timeout, memory, output, refused, error or killed
    output: str
    error: str  # the last line of stderr


def run_program(source: str, data: str = "", seconds: float = 10.0, megabytes: int = 1024) -> Result:
    """Run Python source in the cage. Its output goes to files, so that the kernel's file size limit bounds it."""
    cpu, size = math.ceil(seconds), 64 * 1024
    limits = {"AS": megabytes << 20, "FSIZE": size, "NPROC": 0, "NOFILE": 64, "CORE": 0}
    limits = {name: (value, value) for name, value in limits.items()} | {"CPU": (cpu, cpu + 1)}
    given = {"source": source, "data": data, "limits": limits, "filter": filter_code().hex(), "parent": os.getpid()}
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-B", "-X", "utf8", "-c", inspect.getsource(cage) + "\ncage()"]
    with tempfile.TemporaryDirectory(prefix="eval_math-") as folder, ExitStack() as files:
        Path(folder, "in").write_text(json.dumps(given))
        modes = {"stdin": "rb", "stdout": "ab+", "stderr": "ab+"}
        streams = {k: files.enter_context(open(Path(folder, k[3:]), mode)) for k, mode in modes.items()}
        child = subprocess.Popen(command, **streams, cwd=folder, env=threads, start_new_session=True)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # the group outlives its leader only where nothing was filtered
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        output, error = (Path(folder, name).read_bytes().decode("utf-8", "replace").strip() for name in ("out", "err"))
    last = error.rpartition("\n")[2][:200]
    return Result(status_of(code, last, max(len(output), len(error)) > size - 200), output, last)


def status_of(code: int | None, error: str, full: bool) -> str:
    if code is None or code == -signal.SIGXCPU:
        return "timeout"
    if full or "File too large" in error:
        return "output"
    if code <= 0:
        return "ok" if code == 0 else "killed"
    if "MemoryError" in error.partition(":")[0] or "Cannot allocate memory" in error:
        return "memory"
    return "refused" if re.match("PermissionError|.*not (permitted|allowed)|.*start new thread", error) else "error"


PROBE = """
import os, socket
def attempt(name, action):
    try:
        action()
        print(name)
    except Exception:
        pass
attempt("network", lambda: socket.socket())
attempt("processes", lambda: os.kill(os.getpid(), 0))
attempt("files", lambda: open("probe", "w"))
attempt("the evaluator's environment", lambda: open(f"/proc/{os.getppid()}/environ").read(1))
"""


def open_doors() -> list[str]:
    """What a program can reach on this system although it shouldn't."""
    result = run_program(PROBE)
    if result.status != "ok":
        reason = result.error or result.status
        raise CageError(f"--execute_programs: no program can run here ({reason}): use --mode cot")
    return result.output.splitlines()
