"""eval_math.py: awkward answers, hostile programs, decoding against `generate`, cut runs."""

import io
import json
import os
import re
import shutil
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
from colm_data import demo_tokenizer

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

# What a looser number rule accepted or refused: words and letters that change a value, other spellings, Python's forms
HARD = r"""
x+1 | x+1; 1+x; $x+1$; x + 1 | 1; x; x-1; +1; x+2
8-i | 8-i; -i+8; 8 - I | 8; 8+i; i; -8
\text{June 20} | June 20; \text{June 20}; june 20 | July 20; 20; June 21; June
18 | 18; n = 18; 18 ways; $18$; 18 \text{ ways}; n=18 | n+18; n + 18; 18n; n-18; 18 n; 18x; x^{18}; 18!!; 1 8; 18 or 19
6 | 6; six (6); 6 (six); 6!; ≈ 6; approximately 6; \approx 6; 6 (as required) | half of 6; 6 dozen; 6 and a half; double 6; 6!!; 6 thirds; twice 6; a quarter of 6; the square root of 6; 6 squared; log 6; 6 hundred; six hundred 6; 6 millionths; less than 6; at least 6; 6th power
3 km north | 3 km north; 3 km | 3 km south; 3 miles north; 3 km west
5 pm | 5 pm; 5 p.m.; 5 PM | 5 am; 5 a.m.
\frac{1}{4}x | \frac{1}{4}x; \frac{1}{4} x; \dfrac{1}{4}x; \frac14x; \frac{x}{4}; 0.25x; x/4; \tfrac{1}{4} x; \frac{1}{4} \cdot x | \frac{1}{4x}; 1/(4x); 4x; \frac{1}{4}; x
\frac{1}{2}\pi | \frac{\pi}{2}; \frac12\pi; \pi/2; 0.5\pi; pi/2; π/2; \dfrac{\pi}{2} | \frac{1}{2\pi}; \frac12; 2\pi; \pi
\frac{3}{2}\sqrt{5} | \frac{3\sqrt{5}}{2}; \dfrac32\sqrt5; 1.5\sqrt{5}; 3√5/2; 3*sqrt(5)/2 | \frac{3}{2\sqrt{5}}; \frac32; \sqrt{5}
12345 | 12\,345; 12{,}345; 12,345; $12\,345$; 12,345.0 | 12; 345; 12.345; 12,34; 123456
12 | 12 units per hour; 12 per day; 12 km/h; 12 mph; \$12 per hour; 12 cm³; 12 cm^3 | 12 n; 12 times 3
60\text{ mph} | 60 mph; 60 miles per hour; 60 mi/h; 60; 60 miles/hour; 60 miles an hour | 60 miles; 60 hours; 60 km/h; 60 kph; 60 m; 60 miles per minute; 16 mph
25 km | 25 km; 25 kilometres; 25 kilometers | 25 km/h; 25 km per hour; 25 hours
\frac{1}{2} | ½; 1/2; 0.5; one half (1/2); \frac{1}{2}; Fraction(1, 2); Rational(1, 2); 0.50; \frac {1} {2}; 0.5000000001 | ¼; 1½; 2; Fraction(2, 1); -½
\frac{3}{2} | 1½; 1 1/2; 3/2; 1.5; 1\frac{1}{2}; 1 \frac12 | 11/2; ½; 3; 1/2; 1
\sqrt{2} | √2; \sqrt2; sqrt(2); $\sqrt{2}$; 2^{1/2}; √(2) | 2; √3; \sqrt[3]{2}; 1.4; 2√2; 1.41421
2\sqrt{3} | 2√3; 2*sqrt(3); \sqrt{12}; 2 \sqrt 3 | 2; 3; \sqrt{3}; 3√2; 23
(3,4) | x = 3, y = 4; (3, 4); x=3 and y=4; $x = 3$ and $y = 4$; x = 3, y = 4.; (3,4); 3, 4 | x = 4, y = 3; x = 3; (4,3); x = 3, y = 5; y = 3; 34; 3; 4
(3,-4) | x = 3, y = -4; (3,-4); x=3, y=-4 | x = 3, y = 4; x = -3, y = 4; (-4, 3)
\frac{3}{7} | 3/7 = 0.4286; 3/7; \frac{3}{7} \approx 0.4286; 3/7 ≈ 0.43; \frac{3}{7} = 0.428571; 0.428571 | 0.4286; 3/7 = 0.5; 7/3; 0.43; 4/7 = 0.571
0 | 1.2e-16; -2.3e-17; 0; 0.0; -0.0; 1.7763568394002505e-15 | 1e-3; 1e-6; 0.01; none
3 | 2.9999999999999996; 3.0000000000000004; 3 | 2.99; 3.01; 2.9996; 3.001
1+2i | 1 + 2*I; 1+2i; 2i + 1; (1+2j); 1 + 2*i; 1+2j; 1 + 2I | 1 - 2*I; 1+2; 3; 2+i; 12
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | Matrix([[1], [2]]); [[1], [2]]; \begin{bmatrix} 1 \\ 2 \end{bmatrix}; \begin{pmatrix} 1 \\ 2 \end{pmatrix}; \left(\begin{array}{c} 1 \\ 2 \end{array}\right) | Matrix([[2], [1]]); [[1, 2]]; 1; 2; 12; Matrix([[1, 2]])
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | Matrix([[1, 2], [3, 4]]); [[1, 2], [3, 4]]; [[1 2] [3 4]] | [[1, 3], [2, 4]]; 1; 1234
45 | 45; 45°; 45 degrees; 45^\circ; $45^{\circ}$; angle of 45 degrees; 45º | 54; 45x; 45\pi
-3 | -3; is -3; −3; negative 3; minus 3; x = -3; –3; (-3) | 3; 0-3x; 2-3i; - 3x; x-3
7.5 | 7.5; 7½; 7 1/2; 15/2; 7.50; seven and a half (7.5); \$7.50 | 7; 75; 7.05; 7 and a half 7
1.5 million | 1.5 million; 1500000; 1,500,000; 1.5e6; 1.5 \times 10^6; $1.5 million | 1.5; 1.5 billion; 15 million
100 | 100; 1e2; 10^2; 100 dollars; $100; 100.00; \$100; USD 100; 100 USD; a total of 100 | 1000; 100 thousand; 100%x; 10; 100 cents or 1
2\pi | 2π; 2\pi; 2*pi; $2\pi$; 6.283185307179586 | 2; \pi; 2\pi^2; 2\pi r
x \in [1,2] | [1,2]; x \in [1,2]; [1, 2] | (1,2); [1,2); 1; [1,3]
5\sqrt{2} \text{ cm} | 5\sqrt{2}; 5\sqrt{2} cm; 5√2 cm; 5 \sqrt{2} \text{ cm} | 5; \sqrt{2} cm; 5 cm; 7.07 cm
A | A; (A); A.; a; \text{A} | B; AB; an A or B
33 | The total is 33; she has 33 apples left; 33 of them; 33 more apples; 33 apples left over; 33 more than before; 33 times; 33 pairs of shoes; approx. 33; 33 apples in each of the two boxes | more than 33; over 33; 33 and a half; 33 dozen; twice 33; 33 or more; 33 and two thirds; no 33; 133; 33,000; 33 hundred
50 | 50; 50 cents; 50 minutes; 50 (fifty); 50 people; 50/1 | 0.50; 50 thousand; 1/50; 50x; 50:1; 1:50; 50-50; 50^2; 5 0
\frac{8t}{3} | \frac{8}{3}t; \frac{8}{3} t; 8t/3; \frac83t | \frac{8}{3}; 8/3; \frac{3t}{8}; t
\frac{8}{3} | 8/3; \frac83; \frac{8}{3} \text{ m} | \frac{8}{3}t; 8t/3; \frac{8}{3} t; \frac{8}{3}m; 8m/3
20^\circ | 20; 20 degrees; 20°; 20^{\circ}; $20^\circ$ | 20\%; 20%; 0.2; 20 km; 20 cents
-1 | -1; -1.0; -1.0000000001 | -\frac{2010012}{2010013}; -2010012/2010013; 1; -0.99
8\sqrt{3} \text { square inches} | 8\sqrt{3}; 8\sqrt{3} square inches; 8\sqrt{3} \text{ square inches}; 8√3; 8\sqrt{3} \text{ in}^2 | 8; 3\sqrt{8}; 8\sqrt{3}x; 24
99\pi \text{ square inches} | 99\pi; 99π; 99\pi square inches; 99 \pi \text{ square inches}; 99\pi in^2 | 99; 9\pi; 99\pi r; 99\pi^2
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


def test_strict_score_of_awkward_answers(monkeypatch):
    monkeypatch.setattr(E, "JUDGE_SECONDS", 1)  # three of them would take for ever
    table = list(cases(STRICT)) + list(cases(HARD))
    assert len(table) >= 700
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
    ("gsm8k", "?", "3", "The answer is 3.4", False, False),
    ("gsm8k", "?", "3", "The answer is 2.5000001", False, False),
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
    ("svamp", "?", "0", "The answer is 0.4", False, False),
    ("svamp", "?", "-3", "The answer is -3", True, True),
    ("svamp", "?", "0.5", "The answer is 1/2", False, True),
    ("simuleq", "?", "583.3333", "The answer is 600", False, False),
    ("simuleq", "?", "583.3333", "The answer is 583.3333333333334", False, True),  # paper: another string
    ("simuleq", "?", "583.3333", "The answer is 610", False, False),
    ("simuleq", "?", "12.5", "The answer is 12.1", False, False),
    ("simuleq", "?", "12.5", "The answer is 25/2", False, True),
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
    # what follows is the strict reading alone: where the answer stands
    ("math", "?", "5", "So $x = \\boxed{5}$. Hence our answer is correct.", True, True),
    ("math", "?", "\\frac{1}{2}", "The answer is\n\\[\n\\frac{1}{2}\n\\]", False, True),
    ("math", "?", "\\frac{1}{2}", "The answer is:\n\n$$\\boxed{\\frac{1}{2}}$$", True, True),
    ("math", "?", "4", "The answer is 3. No: it is $\\boxed{4}$.", True, True),
    ("math", "?", "\\frac{3}{4}", "So we get $x = \\frac{3}{4}$.", False, True),
    ("numglue", WEB, "B", "The answer is choice B.", True, True),
    ("numglue", WEB, "B", "The answer is B (tree)", True, True),
    ("numglue", WEB, "B", "The answer is B is correct.", True, True),
    ("numglue", WEB, "B", "The correct answer is: **B**", True, True),
    ("numglue", WEB, "A", "The answer is B (tree)", False, False),
    ("numglue", WEB, "A", "The answer is a tree (B)", True, False),
    ("math", "?", "\\frac{1}{4}x", "The answer is $\\dfrac{1}{4}x$.", False, True),
]


def test_both_scores_of_whole_responses():
    rows = []
    for i, (task, question, gold, text, _, _) in enumerate(RESPONSES):
        rows.append((E.Row(task, i, question, gold, E.kind_of(task, {}, gold)), text))
    for place, name in ((4, "paper"), (5, "strict")):
        got = verdicts(rows, name)
        assert [(name, case) for case, verdict in zip(RESPONSES, got, strict=True) if case[place] != verdict] == []


OFFICIAL = [  # set, gold, response, and what math_eval/utils.py of the official code gives: the answer and the verdict
    ("math", "2", "The answer is (2)", "(2)", True),
    ("math", "2", "The answer is [2]", "[2]", True),
    ("math", "6", "The answer is 12 - 6", "12-6", True),
    (
        "math",
        "6",
        "The answer is 6\n\n### Instruction:\nWhat is 4?\n\n### Response: The sum is 4",
        "6###Instruction:Whatis4?###Response:Thesumis4",
        True,
    ),
    ("math", "6", "The answer is 6\n\n### ", "6###", True),
    ("math", "3\\sqrt{2}", "The answer is 3\\sqrt{2}\n\n### ", "3\\sqrt{2}###", False),
    ("math", "23", "The answer is (2,3)", "(2,3)", True),
    ("math", "2", "The answer is 2 or 3", "2or3", False),
    ("math", "1", "The answer is 2^3", "2^3", True),
    ("math", "8", "The answer is 2**3", "2**3", True),
    ("math", "1", "The answer is True", "True", True),
    ("math", "5", "The answer is '5'", "'5'", True),
    ("math", "0.5", "The answer is 0.519", "0.519", True),
    ("math", "0.5", "The answer is 0.521", "0.521", False),
    ("math", "-0.5", "The answer is -0.49", "-0.49", True),
    ("math", "100", "The answer is 99.6", "99.6", True),
    ("math", "100", "The answer is 100.5", "100.5", True),
    ("math", "100", "The answer is 101.5", "101.5", False),
    ("math", "1", "The answer is 3>2", "3>2", True),
    ("math", "1.41", "The answer is math.sqrt(2)", "math.sqrt(2)", True),
    ("math", "3", "The answer is The answer is 5. So the answer is 3", "5.Sotheansweris3", False),
    ("math", "5", "the answer is 3. The answer is 5", "5", True),
    ("math", "\\frac{1}{2}", "The answer is \\frac12.", "\\frac{1}{2}", True),
    ("math", "3", "The answer is 3/", "3", True),
    ("math", "3", "The answer is 9**9**9**9", "9**9**9**9", False),
    ("math", "3", "The answer is 3j", "3j", False),
    ("math", "3", "The answer is inf", "inf", False),
    ("math", "3", "The answer is nan", "nan", False),
    ("math", "3", "The answer is {3}", "{3}", False),
    ("math", "3", "The answer is [3, 4]", "[3,4]", False),
    ("math", "34", "The answer is 3,4", "3,4", True),
    ("math", "7", "The answer is x = 7", "7", True),
    ("math", "\\sqrt{3}", "The answer is \\sqrt3", "\\sqrt{3}", True),
    ("math", "3", "\\boxed{3", "3", True),
    ("math", "", "boxed", "", True),
    ("gsm8k", "3.5", "The answer is 3.50", "3.5", True),
    ("gsm8k", "100", "The answer is 1e2", "1", False),
    ("gsm8k", "100000000000000000000", "The answer is 100000000000000000000", "100.0", True),
    ("gsm8k", "3", "The answer is 3/4", "3/4", False),
    ("gsm8k", "3", "The answer is 3/", "3", True),
    ("svamp", "3.50", "The answer is 3.5", "3.5", True),
    ("deepmind", "2.50", "The answer is 2.50", "2.5", False),
    ("deepmind", "2.5", "The answer is 2.50", "2.5", True),
    ("simuleq", "12.0", "The answer is 12", "12", False),
    ("numglue", "1,536", "The answer is 1536", "1536", False),
    ("numglue", "5", "The answer is a 5", "A", False),
    ("mine", "A", "The answer is 5", "5", False),
    ("gsm8k", "42", "It is 42. So 7 = 42", "42", True),
    ("gsm8k", "42", "The answer is 7 = 42 = 43", "43", False),
]


@pytest.mark.parametrize("task, gold, text, answer, verdict", OFFICIAL)
def test_the_paper_score_is_the_official_one(task, gold, text, answer, verdict):
    row = E.Row(task, 0, "?", gold, E.kind_of(task, {}, gold))
    assert (E.paper_answer(row.kind, text), E.paper_correct(row, text)) == (answer, verdict)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch x')",
        "(lambda: 3)()",
        "[x for x in [3]]",
        "().__class__",
        "math.pi.real",
        "9**9**9**9",
        "1<<10**9",
        "'3'*10**9",
        "-" * 280 + "3",
        "(" * 280,
        "math.__name__",
        "3if 3else 3",
        "f'{3}'",
    ],
)
def test_what_a_model_wrote_is_not_evaluated(text):
    assert E.evaluated(text) in (None, 3)  # an even number of signs is arithmetic


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
        E.strict_verdict(E.Row("math", 0, "?", "3"), response)
        E.paper_correct(E.Row("math", 0, "?", "3", "math"), response)
        E.paper_correct(E.Row("gsm8k", 0, "?", "3"), response)
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
    "an endless file": ("print(len(open('/dev/urandom', 'rb').read()))", "memory"),
    "prints without end": ("while True: print('x' * 1000)", "output"),
    "prints at once": ("print('x' * 10**8)", "output"),
    "complains without end": ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "output"),
    "forks": ("import os\nwhile True: os.fork()", "refused"),
    "threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        "error",
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
    "fetches a page": ("import urllib.request as u; print(u.urlopen('http://127.0.0.1'))", "error"),
    "reads the environment": ("import os; print(open(f'/proc/{os.getppid()}/environ').read())", "refused"),
    "reads memory": ("import os; print(open(f'/proc/{os.getppid()}/mem', 'rb').read(9))", "refused"),
    "raises its limits": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "error"),
    "forks below libc": ("import ctypes as c, os; c.CDLL(None).syscall(57) >= 0 or os.getpgid(0)", "refused"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "killed"),
    "recurses": ("def f(): f()\nf()", "error"),
    "waits for input": ("print(input())", "error"),
    "exits": ("import sys; print(1); sys.exit(3)", "error"),
    "is broken": ("print(1", "error"),
    "claims a refusal": ("raise ValueError('negative numbers are not permitted')", "error"),
    "claims to lack memory": ("import sys\nprint('MemoryError: no', file=sys.stderr)\nsys.exit(3)", "error"),
    "names two lines": ("raise KeyError('a\\nPermissionError: b')", "error"),
    # what a program should not see; the last part of each is a file that is there
    "reads the gold answers": (f"print(open({str(ROOT / 'README.md')!r}).read())", "refused"),
    "reads this project": (f"print(open({str(ROOT / 'eval_math.py')!r}).read())", "refused"),
    "lists the home folder": ("import os; print(os.listdir(os.path.expanduser('~')))", "refused"),
    "lists temporary files": ("import os; print(os.listdir('/tmp'))", "refused"),
    "reads the passwords": ("print(open('/etc/passwd').read())", "refused"),
    "reads the root": ("import os; print(os.listdir('/'))", "refused"),
    "listens to the terminal": ("print(open('/dev/tty').read())", "refused"),
    "reads its own limits": ("print(open('/proc/self/limits').read())", "refused"),
    "looks at processes": ("import os; print(os.listdir('/proc'))", "refused"),
    "reads another's pipe": ("import os; print(open(f'/proc/{os.getppid()}/fd/1').read())", "refused"),
    "reads through a link": ("import os; print(open(f'/proc/{os.getppid()}/cwd/README.md').read())", "refused"),
    "reads a disk": ("print(open('/dev/vda', 'rb').read(9) or open('/dev/zero', 'rb').read(9))", "refused"),
    "reads the kernel's log": ("print(open('/dev/kmsg', 'rb').read(9) or open('/proc/kmsg').read())", "refused"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every hostile program, two at a time."""
    E.tempfile.tempdir = str(tmp_path_factory.mktemp("programs"))

    def run(case):
        # Those that never end need no more time than an interpreter needs to start; others may wait for a busy core.
        return E.run_program(case[0], seconds=1 if case[1] == "timeout" else 20, megabytes=512)

    with E.ThreadPoolExecutor(2) as pool:
        return dict(zip(HOSTILE, pool.map(run, HOSTILE.values()), strict=True))


@pytest.fixture(scope="module")
def landlock():
    """Whether this kernel has it; without, programs read what the user can, and a run says so (see below)."""
    return E.run_program(f"open({str(ROOT / 'README.md')!r})", seconds=20).status == "refused"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_is_contained(results, landlock, name):
    if not landlock and list(HOSTILE).index(name) >= list(HOSTILE).index("reads the gold answers"):
        pytest.skip("a kernel without Landlock")
    assert results[name].status == HOSTILE[name][1], results[name]
    assert len(results[name].output) <= 2**16


def test_nothing_is_left_of_hostile_programs(results, landlock, capsys):
    assert not list(Path(E.tempfile.gettempdir()).iterdir())
    E.check_programs()
    assert ("without Landlock" in capsys.readouterr().err) != landlock


def test_a_kernel_without_landlock_is_warned_of(monkeypatch, capsys):
    monkeypatch.setattr(E, "LANDLOCK", (999, 999, 999))  # no such calls, as before Linux 5.13
    assert E.run_program(f"print(len(open({str(ROOT / 'README.md')!r}).read(9)))")[:2] == ("ok", "9")
    assert E.run_program("open('x', 'w')").status == "refused"  # the filter stays
    E.check_programs()
    assert "warning: without Landlock (Linux 5.13) programs can read files" in capsys.readouterr().err


def test_the_evaluator_in_reach_is_warned_of(monkeypatch, capsys):
    monkeypatch.setattr(E, "run_program", lambda *_, **__: E.Result("ok", f"/proc/{os.getpid()}/environ", ""))
    E.check_programs()
    assert "warning: this system lets programs read the evaluator's environment" in capsys.readouterr().err


def test_rules_that_the_kernel_refuses_end_the_run(monkeypatch, landlock):
    if not landlock:
        pytest.skip("a kernel without Landlock")
    monkeypatch.setattr(E, "LANDLOCK", (444, 445, 999))
    assert "the kernel has Landlock, but refuses the rules" in E.run_program("print(1)").error


def test_programs_compute_without_our_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert E.run_program("import os; print(sorted(os.environ))").output.count("TOKEN") == 0
    solve = "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 4, x))\n"
    solve += "import numpy as np\nprint(np.arange(3) @ np.eye(3))"
    assert E.run_program(solve, seconds=30).output.splitlines() == ["[-2, 2]", "[0. 1. 2.]"]
    times = "import datetime, random, zoneinfo\nprint(datetime.datetime.now().year > 2000, random.random() < 1, 'é')"
    assert E.run_program(times).output == "True True é"


def test_packages_on_pythonpath_are_handed_over_and_private_folders_are_not(tmp_path, monkeypatch, landlock):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "sums.py").write_text("three = 3")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "gold.py").write_text("answer = 3")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "packages"), str(tmp_path / "work"), str(tmp_path), *sys.path])
    assert E.run_program("import sums; print(sums.three)").output == "3"
    assert "No module named 'gold'" in E.run_program("import gold").error
    assert "No module named 'eval_math'" in E.run_program("import eval_math").error
    if landlock:
        assert E.run_program(f"open({str(tmp_path / 'work' / 'gold.py')!r})").status == "refused"


def test_a_program_that_cannot_be_started_is_a_status(monkeypatch):
    def popen(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(E, "Popen", popen)
    assert E.run_program("print(1)") == ("failed", "", "BlockingIOError: [Errno 11] Resource temporarily unavailable")


@pytest.mark.parametrize("delay", [0, 0.01, 0.03, 0.1])
def test_a_killed_evaluator_leaves_no_program_behind(delay):
    """Killed at any moment of a program's start: the child ends with it, or sees that its parent is another one."""
    evaluator = os.fork()
    if evaluator == 0:
        E.run_program("import time; time.sleep(300)", seconds=300)
        os._exit(0)
    children, path = "", Path(f"/proc/{evaluator}/task/{evaluator}/children")
    while not children:
        children = path.read_text()
    time.sleep(delay)
    os.kill(evaluator, signal.SIGKILL)
    os.waitpid(evaluator, 0)
    deadline = time.time() + 30
    while alive(children.split()[0]) and time.time() < deadline:
        time.sleep(0.01)
    assert not alive(children.split()[0])


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PROGRAMS = [  # a response, and what execute_with_timeout of the official code makes of it
    ("print(sqrt(16))", ""),
    ("import numpy as np\nprint(np.ones(2).sum())", "2.0"),
    ("print(np.ones(2).sum())", ""),
    ("print(math.sqrt(16))", "4.0"),
    ("from sympy import *\nprint(1)", ""),
    ("if __name__ == '__main__':\n  print(3)", ""),
    ("print(3)\nexit()", ""),
    ("print(3)\nraise SystemExit", ""),
    ("print(3)\n1/0", ""),
    ("def f(n):\n  return 1 if n < 2 else n * f(n - 1)\nprint(f(5))", "120"),
    ("Sure:\n```python\nprint(3)\n```", ""),
    ("```python\nprint(3)\n```\nIt prints", "3"),
    ("```\nprint(3)\n```", ""),
    ("print(hashlib.md5(b'').hexdigest())", ""),
    ("x = 3\ndef g():\n  global x\n  return x\nprint(g())", ""),
    ("s = '''a\nb'''\nprint(s)", "a\n  b"),
    ("return 5\nprint(3)", ""),
    ("print(3)\n\n\n# x", "3"),
    ("print(json.dumps([1]), re.sub('a', 'b', 'a'))", "[1] b"),
    ("from math import sqrt\nprint(sqrt(9))", "3.0"),
    ("x = [i for i in range(3)]\nprint(sum(y * len(x) for y in x))", "9"),
    ("print()", ""),
    ("print('  3 ')", "  3 "),
    ("for i in range(2):\n    print(i)", "0\n1"),
    ("print(1)\n\n### Instruction:\nprint(2)", "1"),
    ("@lru_cache(None)\ndef f(n):\n  return n if n < 2 else f(n-1) + f(n-2)\nprint(f(30))", "832040"),
    ("class A:\n  x = 4\nprint(A().x)", "4"),
    ("import sys\nsys.stdout.write('9')  # print(", "9"),
    ("import sympy\nprint(sympy.Rational(1, 3))", "1/3"),
    ("x = 5\nx += 1\nprint(f'The answer is {x}')", "The answer is 6"),
    ("print 3", ""),
    ("nonlocal x\nprint(3)", ""),
    ("exec('y = 3')\nprint(locals()['y'])", "3"),
    ("print(undefined)", ""),
    ("assert False, print(3)", ""),
]


def test_programs_run_as_the_official_code_runs_them():
    def printed(text):
        ran = E.run_program(E.official_program(text), seconds=20)
        return ran.output if ran.status == "ok" else ""

    with E.ThreadPoolExecutor(2) as pool:
        got = list(pool.map(printed, [text for text, _ in PROGRAMS]))
    assert [(text, found) for (text, _), found in zip(PROGRAMS, got, strict=True)] == PROGRAMS


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
def test_program_of_its_own_in_a_response(text, program):
    assert E.own_program(text) == program


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


def launch(home, out, *more, processes):
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
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
    child, file = os.fork(), home / "killed" / "predictions-0.jsonl"
    if child == 0:
        E.main(flags(home, "killed"))
        os._exit(0)
    while not (file.exists() and file.read_text().count("\n") > 5) and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
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


TEXTS = {  # a response, and the status of its program
    "print(3)": "ok",
    "x = 1\nwhile True: x += 1\nprint(x)": "timeout",
    "print(1 / 0)": "error",
    "The answer is 4.": "none",
    "print('none')": "ok",
    "print('1' * 10**6)": "output",
    "Here it is:\n```python\nprint(5)\n```": "error",
}


@pytest.fixture
def programs(monkeypatch):
    """The model's answers are programs, by the tokens that it wrote."""
    load = E.load

    def load_writer(*args):
        model, tokenizer, room = load(*args)
        tokenizer.decode = lambda tokens, **_: list(TEXTS)[sum(tokens) % len(TEXTS)]
        return model, tokenizer, room

    monkeypatch.setattr(E, "load", load_writer)


def records_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_programs_run_and_rows_without_an_answer_are_asked_again(home, programs):
    more = ("--mode", "pot", "--execute_programs", "--program_seconds", "1", "--max_rows", "14")
    runs = {}
    for out, backup in (("pot", []), ("backup", ["--cot_backup"])):
        E.main(flags(home, out, *more, *backup))
        runs[out] = records_of(home / out)
        assert [r["row"] for r in runs[out]] == list(range(14))
    counts = json.loads((home / "pot" / "results.json").read_text())["tasks"]["sums"]["programs"]
    assert sum(counts.values()) == 14 and set(TEXTS.values()) >= set(counts) >= {"ok", "error"}
    for pot, backup in zip(runs["pot"], runs["backup"], strict=True):
        assert pot["program"] == TEXTS[pot["output"]] == backup["program"]
        asked_again = pot["output"] not in ("print(3)", "The answer is 4.")  # no number came out
        assert ("program_text" in backup) == asked_again
        assert (pot["paper_answer"] == "") == asked_again
        if pot["output"].startswith("Here"):  # a file of its own prints 5, the official way to run it nothing
            assert pot["answer"] == "5" and pot["own_program"] == "ok" and backup["own_printed"] == "5"
        elif pot["output"] == "print(3)":
            assert pot["answer"] == pot["paper_answer"] == "3"


def test_without_leave_no_program_runs_and_the_run_says_so(home, programs, capsys):
    E.main(flags(home, "cot", "--max_rows", "12"))
    records = records_of(home / "cot")
    idle = sum("print(" in r["output"] for r in records)
    assert idle and not any("printed" in r for r in records)
    assert f"{idle} answers hold programs, which the paper's scorer runs in this mode, too" in capsys.readouterr().out
    E.main(flags(home, "cot_run", "--max_rows", "12", "--execute_programs", "--program_seconds", "1"))
    for record in records_of(home / "cot_run"):
        assert ("printed" in record) == ("print(" in record["output"])


def test_a_stop_word_ends_an_answer_and_is_cut(home, whole):
    model, tokenizer, room = E.load(E.parse_args(flags(home, "stop")), torch.device("cpu"))
    texts = {1: "so 3", 8: "so 3. ### Instruction", 32: "so 3. ### Instruction:\nWhat"}
    written = []

    def decode(tokens, **_):
        written.append(len(tokens))
        return texts[max(n for n in texts if n <= max(1, len(tokens)))]

    tokenizer.decode = decode
    model.generation_config.eos_token_id, tokenizer.eos_token_id = 511, 511
    args = E.parse_args(flags(home, "stop", "--max_new_tokens", "64"))
    row = E.Row("t", 0, "Add 1 and 2.", "3")
    for chat, output, ended, tokens in (
        (False, "so 3. ### ", True, 16),
        (True, "so 3. ### Instruction:\nWhat", False, 64),
    ):
        args.chat_template = chat
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        E.generate([row], model, tokenizer, room, args, home / "stop.jsonl", show=False)
        record = json.loads((home / "stop.jsonl").read_text().splitlines()[-1])
        assert (record["output"], record["ended"], written[-1]) == (output, ended, tokens)


@pytest.fixture(scope="module")
def adapted(home):
    """The records of the adapter in its folder."""
    E.main([*flags(home, "adapted", "--max_rows", "5"), "--model", str(home / "adapter")])
    return records_of(home / "adapted")


def test_an_adapter_is_scored_on_its_base(home, whole, adapted):
    assert records_of(home / "whole")[0]["output"] != adapted[0]["output"]


def loaded(model, *more):
    args = E.parse_args(["--model", str(model), "--max_new_tokens", "8", *more])
    return E.load(args, torch.device("cpu"))


@pytest.mark.parametrize(
    "targets, merges",
    [
        (["v_proj"], True),
        (["v_proj", "lm_head"], False),  # merged, the embedding would change with it
        (["embed_tokens"], False),
        (["v_proj", "q_proj", "o_proj"], True),
    ],
)
def test_adapters_on_tied_embeddings_stay_apart(tmp_path, capsys, targets, merges):
    import peft
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama_tied", lora=False)
    model.save_pretrained(tmp_path / "base")
    demo_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    right = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(90).reshape(3, 30)
    with torch.no_grad():
        expected = right(input_ids=ids).logits
        got = loaded(tmp_path / "adapter")[0](input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert ("it stays apart" in capsys.readouterr().err) != merges


def test_an_adapter_that_stays_apart_is_decoded_as_generate_decodes_it(tmp_path):
    import peft

    model = tiny_model("llama_tied", lora=False)
    model.save_pretrained(tmp_path / "base")
    demo_tokenizer().save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    model = loaded(tmp_path / "adapter")[0]
    queue = deque([E.Request(E.Row("t", 0, "", ""), [5, 6, 7])])
    batch = E.Batch(model, 100, 6, {-1})
    done = []
    while not done:
        done = batch.step(queue)
    alone = model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert done[0].tokens == alone[0, 3:].tolist()


def test_an_adapter_of_the_hub_is_found_in_its_cache(home, adapted, tmp_path):
    """Without a network: the files lie in the cache as a download leaves them."""
    for name, source in (("someone/sums", home / "adapter"), ("someone/base", home / "model")):
        repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        shutil.copytree(source, repo / "snapshots" / ("0" * 40))
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    more = ("--model", "someone/sums", "--base_model", "someone/base", "--max_rows", "5")
    command = [sys.executable, str(ROOT / "eval_math.py"), *flags(home, "hub", *more)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert records_of(home / "hub") == adapted


# -------------------------------------------------------------------------------------------------------------- prompts


def tokenizer_with(home, front, back):
    """The demo's, adding a token before and after each text, as add_bos_token and add_eos_token do."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    parts = ["<|end|>"] * front + ["$A"] + ["<|end|>"] * back
    ids = [("<|end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=" ".join(parts), special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize("front", [0, 1, 2])
@pytest.mark.parametrize("back", [0, 1])
def test_a_prompt_has_the_tokens_before_a_text_and_none_after(home, front, back):
    tokenizer = tokenizer_with(home, front, back)
    plain = tokenizer_with(home, 0, 0)("Add 3 and 4.")["input_ids"]
    assert len(tokenizer("Add 3 and 4.")["input_ids"]) == len(plain) + front + back
    assert E.prompt_ids(tokenizer, "Add 3 and 4.") == [tokenizer.eos_token_id] * front + plain


def test_the_token_that_ends_a_turn_ends_an_answer(home):
    tokenizer = tokenizer_with(home, 0, 0)
    assert E.stop_ids(tokenizer) == {tokenizer.eos_token_id}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    turn, im_end = "{% for m in messages %}[{{ m.role }}]{{ m.content }}", tokenizer.convert_tokens_to_ids("<|im_end|>")
    for end, ids in (("<|im_end|>\n", {im_end}), ("<|end|>", set()), (".", set()), ("<|im_end|> <|end|>", set())):
        tokenizer.chat_template = turn + end + "{% endfor %}"
        assert E.stop_ids(tokenizer) == {tokenizer.eos_token_id} | ids


def prompts_of(home, monkeypatch, tokenizer, question, **settings):
    """The texts that `generate` asks, in the order of asking."""
    asked = []

    def step(self, queue):
        asked.extend(tokenizer.decode(request.prompt) for request in queue)
        queue.clear()
        return []

    monkeypatch.setattr(E.Batch, "step", step)
    model, *_ = E.load(E.parse_args(flags(home, "prompts")), torch.device("cpu"))
    args = E.parse_args(flags(home, "prompts", "--execute_programs"))
    vars(args).update(settings)
    row = E.Row("t", 0, question, "3")
    E.generate([row], model, tokenizer, 4096, args, home / "prompts.jsonl", show=False)
    return asked


def test_prompts_are_the_official_ones_and_the_template_s(home, monkeypatch):
    tokenizer = tokenizer_with(home, 1, 1)
    head = "<|end|>" + (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n"
    )
    tokenizer.chat_template = "<|end|>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    question = "How many? "  # its blank stays
    program = question + " Let's write a program."
    asked = [
        prompts_of(home, monkeypatch, tokenizer, question, mode=mode, chat_template=chat)
        for mode in ("cot", "pot")
        for chat in (False, True)
    ]
    assert asked == [
        [f"{head}{question}\n\n### Response:"],
        [f"<|end|>[user]{question}[assistant]"],
        [f"{head}{program}\n\n### Response:"],
        [f"<|end|>[user]{program}[assistant]"],
    ]


def test_the_template_is_the_default_where_the_rows_were_chats(home, monkeypatch):
    seen = []
    monkeypatch.setattr(E, "read_task", lambda name, args: seen.append(args.chat_template) or [])
    monkeypatch.setattr(E, "open_folder", lambda *_: 1 / 0)
    folder = home / "chats"
    folder.mkdir()
    for record, more in (
        (None, []),
        (True, []),
        (True, ["--no-chat_template"]),
        (False, []),
        (False, ["--chat_template"]),
    ):
        if record is not None:
            (folder / "colm_prompts.json").write_text(json.dumps({"chat_template": record}))
        with pytest.raises(ZeroDivisionError):
            E.main([*flags(home, "chats_out", *more), "--model", str(folder)])
    assert seen == [False, True, False, False, True]


# -------------------------------------------------------------------------------------------------------- files of rows


def read(tmp_path, rows, name="mine.json", lines=False):
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (tmp_path / name).write_text(text)
    args = E.argparse.Namespace(data_dir=str(tmp_path), max_rows=None)
    return [tuple(row)[2:] for row in E.read_task(str(tmp_path / name), args)]


def test_rows_of_every_known_format_are_read(tmp_path):
    official = [{"question": "?", "answer": ["\\frac{1}{2}", 0.5]}, {"question": "?", "answer": ["3\\sqrt{2}", None]}]
    assert read(tmp_path, official) == [
        ("?", "\\frac{1}{2}", "math", 0.5),
        ("?", "3\\sqrt{2}", "math", None),
    ]
    math_500 = {"problem": "?", "solution": "\\boxed{9}", "answer": "4", "subject": "Algebra", "level": 2}
    assert read(tmp_path, [math_500], "test.jsonl", lines=True) == [("?", "4", "math", None)]
    published = {"problem": "?", "level": "Level 3", "type": "Algebra", "solution": "So $\\boxed{\\frac{1}{2}}$."}
    assert read(tmp_path, [published]) == [("?", "\\frac{1}{2}", "math", None)]
    aqua = {"question": " Far? ", "options": ["A)5(√3 + 1)", "B)21"], "rationale": "", "correct": "B"}
    [row] = read(tmp_path, [aqua], "aqua.json", lines=True)
    assert row == ("Far?\nAnswer Choices: (A) 5 (√3 + 1)  (B) 21", "B", "options", None)
    assert {k: v.strip() for k, v in E.options_of(row[0]).items()} == {"A": "5 (√3 + 1)", "B": "21"}
    svamp = {"Body": "He has 3 pens", "Question": "How many?", "Answer": 51.0}
    assert read(tmp_path, [svamp], "svamp.json") == [("He has 3 pens How many?", "51", "numbers", None)]
    assert read(tmp_path, [svamp | {"Answer": "51.0"}], "s.json") == [
        ("He has 3 pens How many?", "51", "numbers", None)
    ]
    assert read(tmp_path, [{"question": "How many? ", "answer": 1536}], "simuleq.json")[0][0] == "How many? "
    assert read(tmp_path, [{"question": " Cost? ", "answer": "80\n#### 2,130"}], "gsm8k.jsonl")[0][:2] == (
        "Cost?",
        "2,130",
    )


def test_a_number_beside_the_gold_answer_is_what_the_paper_compares_with():
    row = E.Row("math", 0, "?", "3\\sqrt{2}", "math")
    assert not E.paper_correct(row, "The answer is 4.2426")
    assert E.paper_correct(row._replace(value=4.242640687), "The answer is 4.2426")
    assert E.paper_correct(row._replace(value=5), "The answer is 5.3") and not E.paper_correct(
        row._replace(value=5.0), "The answer is 5.3"
    )  # a float is compared within 4 %, an int after rounding


HUB_ROWS = {
    "openai/gsm8k": {"question": "Cost?", "answer": "80\n#### 2,130"},
    "EleutherAI/hendrycks_math": {"problem": "?", "level": "1", "type": "", "solution": "$\\boxed{7}$"},
    "ChilleD/SVAMP": {"ID": "1", "Body": "He has 3.", "Question": "How many?", "Equation": "", "Answer": "51.0"},
}


def test_sets_come_from_the_hub_and_the_official_repository_without_a_folder(monkeypatch):
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return [HUB_ROWS[path]]

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(b'[{"question": "Q ", "answer": 3, "type": "Type_1"}, {"question": "Q", "answer": "B"}]')

    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    sys.modules["datasets"].load_dataset = load_dataset
    monkeypatch.setattr(E.urllib.request, "urlopen", urlopen)
    args = E.parse_args(["--model", "m"])
    rows = [row for name in E.FILES for row in E.read_task(name, args)]
    counts = {task: sum(row.task == task for row in rows) for task in E.FILES}
    assert counts == {"gsm8k": 1, "math": 7, "numglue": 2, "svamp": 2, "deepmind": 2, "simuleq": 2}
    assert len({(row.task, row.number) for row in rows}) == 16
    assert {row.gold for row in rows} == {"2,130", "7", "3", "B", "51"}
    assert ("ChilleD/SVAMP", "default", "test") in asked and len(asked) == 1 + 7 + 2 + 3
    assert [url.rsplit("/", 1)[1] for url in asked if isinstance(url, str)] == [
        "numglue.json",
        "deepmind.json",
        "simuleq.json",
    ]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "more, message",
    [
        (["--tasks", "gms8k"], "gms8k is unknown: choose of gsm8k, math, numglue, svamp, deepmind, simuleq"),
        (["--tasks", "gsm8k", "--data_dir", "data"], "data/gsm8k.jsonl does not exist"),
        (["--tasks", "gsm8k"], "gsm8k without --data_dir needs a package: pip install datasets, or give --data_dir"),
        (["--tasks", "numglue"], "numglue.json: .*no network.*: save it as numglue.json and give --data_dir"),
        (["--chat_template"], "--chat_template: .*: use a tokenizer with a template, or --no-chat_template"),
        (["--tasks", "svamp", "--data_dir", "nowhere"], "nowhere/svamp.json does not exist"),
        (["--tasks", "HOME/broken.jsonl"], "broken.jsonl line 2: broken JSON"),
        (["--tasks", "HOME/noanswer.jsonl"], "noanswer.jsonl line 1 has no field 'answer' or 'Answer' or 'correct'"),
        (["--tasks", "HOME/list.json"], "list.json row 1: field 'answer' is .* must be a text or a number"),
        (["--tasks", "HOME/empty.json"], "empty.json row 1: field 'answer' is .* must be a text or a number"),
        (["--tasks", "HOME/number.jsonl"], "number.jsonl line 1 is a int: every row must be a JSON object"),
        (["--tasks", "HOME/sums.jsonl", "HOME/sums.jsonl"], "names a task twice"),
        (["--output_dir", "HOME/whole", "--max_rows", "3"], "max_rows is 3, but .*whole holds a run with None"),
        (["--output_dir", "HOME/whole", "--max_new_tokens", "9"], "max_new_tokens is 9, but .* with 24"),
        (["--mode", "pot"], "allow it with --execute_programs"),
        (["--cot_backup"], "--cot_backup has no effect"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0 is out of range"),
        (["--max_new_tokens", "4000"], "leaves no room for a prompt"),
        (["--model", "HOME/nothing"], "--model .*nothing: .*: give a causal LM's folder"),
        (["--model", "HOME/orphan"], "--model .*orphan: .*: its base is /gone, name another with --base_model"),
        (["--tasks", "HOME/none.json"], "none.json holds no rows"),
        (["--beam", "4"], "unrecognized arguments: --beam 4"),
    ],
)
def test_bad_input_is_one_line(home, whole, capsys, monkeypatch, more, message):
    def no_network(*_, **__):
        raise OSError("no network")

    (home / "broken.jsonl").write_text('{"question": "?", "answer": 1}\n{"question": ')
    (home / "noanswer.jsonl").write_text('{"question": "?"}')
    (home / "list.json").write_text('[{"question": "?", "answer": {"text": 1}}]')
    (home / "empty.json").write_text('[{"question": "?", "answer": []}]')
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(E.urllib.request, "urlopen", no_network)
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
