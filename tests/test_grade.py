"""The grader against a hand-written table, hostile text, and math-verify on the gold answers of the data sets."""

import ast
import json
import random
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2r.grade import judge as grade
from s2r.grade import latex, spelling
from s2r.grade import MAX_CHARS, equivalent, extract_answer, parsable

DATA = Path(__file__).parents[2] / "shared" / "data"
SECONDS = 1.0  # a hostile text is graded within this

# One row per line: answer  ✓  gold answers that it equals  ✗  gold answers that it does not; two spaces separate.
TABLE = r"""
# integers and decimals, as in GSM8K and AIME
72                      ✓  72  72.0  72.  +72  $72$  072  ✗  27  -72  720  7.2  72.1  7 2
-3                      ✓  -3  -3.0  $-3$  \text{-3}  −3  ✗  3  --3  -0.3
0                       ✓  0  -0  0.00  +0  ✗  1  -1  \emptyset  0.1
204                     ✓  204  204.0  \$204  204\text{ minutes}  204 minutes  ✗  203  240  2.04  20.4
033                     ✓  33  ✗  303
.5                      ✓  0.5  1/2  \frac12  50\%  ✗  5  0.05  1/5
3.14                    ✓  3.14  3.140  \frac{314}{100}  \frac{157}{50}  ✗  \pi  3.1416  22/7  3.1

# thousands
1,000                   ✓  1000  1,000  1{,}000  1,\!000  1\,000  1000.00  \$1,000  ✗  1  100  10000  (1,000)  1, 0
11,\! 111,\! 111,\! 100  ✓  11111111100  11,111,111,100  11{,}111{,}111{,}100  ✗  11, 111, 111, 100  1111111100
(1,000)                 ✓  (1,000)  (1, 000)  ✗  1000  (1,1)
70,110                  ✓  70,110  70110  ✗  70  110, 70  (110,70)
70, 110                 ✓  70,110  110,70  110, 70  ✗  70110  (110,70)
100,200                 ✓  100200  ✗  200,100
1 000                   ✓  1000  ✗  1000000  0
1234,567                ✓  1234,567  567, 1234  ✗  1234567
1,000,000.5             ✓  1000000.5  \frac{2000001}{2}  ✗  1000000  1,000

# fractions and mixed numbers
\frac{1}{2}             ✓  1/2  0.5  \dfrac12  \tfrac{2}{4}  \frac{-1}{-2}  (1)/(2)  \frac 12  2^{-1}
\frac{1}{2}             ✗  2  -1/2  0.51  \frac{2}{1}  1  12
1/3                     ✓  \frac13  2/6  \frac{1}3  0.333333  0.3333333333  ✗  0.33  0.333  0.33333  0.333334  1/4  3
\frac{270}7             ✓  270/7  \frac{270}7\text{ degrees}  38.571429  38.5714  38\frac{4}{7}
\frac{270}7             ✗  38.57  38.571  270  7
1\frac{4}{5}            ✓  9/5  1.8  1 \frac45  1 4/5  ✗  4/5  14/5  1.45  \frac{1 \cdot 4}{5}
-2\frac{1}{2}           ✓  -2.5  -5/2  -2 1/2  ✗  -1.5  -1  2.5
137 \frac{1}{2}         ✓  137.5  275/2  ✗  68.5  137
3\frac{x}{2}            ✓  \frac{3x}{2}  1.5x  ✗  3+\frac{x}{2}
\frac{11+9a}{20}        ✓  \frac{9a+11}{20}  0.45a+0.55  \frac{11}{20}+\frac{9a}{20}
\frac{11+9a}{20}        ✗  \frac{11+9b}{20}  \frac{11-9a}{20}  a
\frac{1}{\frac{1}{2}+\frac13}  ✓  6/5  1.2  ✗  5/6

# decimals that approximate
1.414214                ✓  \sqrt{2}  1.414214  ✗  1.4142135  1.41421  \sqrt{2.0001}
1.4142                  ✓  1.4142  ✗  \sqrt2
3.14159                 ✓  \pi  3.14159  ✗  3.1416  3.141592  22/7
-1.732051               ✓  -\sqrt3  ✗  \sqrt3
\approx 8.24            ✓  8.24  \approx 8.24 \text{ mph}  ✗  8.2  8.25
0.3333333               ✓  1/3  ✗  0.333333  0.33333333

# scientific notation, powers, factorials, binomials
6.02 \times 10^{23}     ✓  6.02\cdot10^{23}  6.02e23  602000000000000000000000  ✗  6.02\times10^{22}  6.02
1.2\times10^{-3}        ✓  0.0012  1.2e-3  .0012  1.2E-03  ✗  0.012  1.2
2^{4950}                ✓  4^{2475}  2 \cdot 2^{4949}  ✗  2^{4951}  2^{4950}-1  2^{4950}+1
2^{10}                  ✓  1024  4^5  2**10  2^10  ✗  20  1000  2^9
2^{3^2}                 ✓  512  ✗  64
-2^2                    ✓  -4  ✗  4
5!                      ✓  120  ✗  5  125
\binom{5}{2}            ✓  10  \frac{5!}{2!\,3!}  \dbinom52  ✗  20  \binom{5}{3}-1  2.5

# roots
2\sqrt{3}               ✓  \sqrt{12}  2\sqrt3  \frac{6}{\sqrt{3}}  2sqrt(3)  2*sqrt(3)  \sqrt{3}\cdot 2  2√3
2\sqrt{3}               ✗  \sqrt{6}  3\sqrt{2}  2+\sqrt3  3.46  -2\sqrt3  \sqrt[3]{24}
\frac{\sqrt{2}}{2}      ✓  \frac{1}{\sqrt{2}}  1/\sqrt2  \sqrt{1/2}  \sqrt{0.5}  2^{-1/2}
\frac{\sqrt{2}}{2}      ✗  \sqrt{2}  0.7  \frac{\sqrt{3}}{2}
\sqrt[3]{-8}            ✓  -2  ✗  2
\sqrt{4}                ✓  2  \sqrt[3]{8}  ✗  -2  \pm 2
1+\sqrt{2}              ✓  \sqrt2+1  \frac{1}{\sqrt2-1}  ✗  1-\sqrt{2}  \sqrt{3}
\sqrt{3+2\sqrt{2}}      ✓  1+\sqrt2  ✗  1+\sqrt3  3+\sqrt2
8(\sqrt[10]{2^{7}})     ✓  2^{3.7}  8 \cdot 2^{7/10}  ✗  2^{37}

# constants, functions, degrees
\pi                     ✓  π  \frac{2\pi}{2}  pi  ✗  3.14  22/7  2\pi  3
576\pi                  ✓  576\pi\;m^{2}  576\,\pi  $576 \pi$  576\pi\text{ cm}^2  ✗  576  57.6\pi  576\pi^2
90^\circ                ✓  90  90^{\circ}  90°  90\text{ degrees}  90 degrees  \frac{\pi}{2}  ✗  9  100^\circ  \pi  0.9
\frac{\pi}{2}           ✓  90^\circ  \pi/2  ✗  90  \frac{\pi}{3}  180^\circ
\sin 30^\circ           ✓  1/2  0.5  \cos 60^\circ  \sin\frac{\pi}{6}  ✗  \sin 30  \sin 60^\circ  30
\cos(6^\circ)\sin(12^\circ)\csc(18^\circ)  ✓  \frac{\sin 12^\circ\cos 6^\circ}{\sin 18^\circ}
\cos(6^\circ)\sin(12^\circ)\csc(18^\circ)  ✗  \cos(6)\sin(12)\csc(18)
\tan x                  ✓  \frac{\sin x}{\cos x}  \tan(x)  \frac{1}{\cot x}  ✗  \cot x  \tan y  \tan 2x
\cos^2 x                ✓  1-\sin^2 x  (\cos x)^2  \frac{1+\cos 2x}{2}  ✗  \cos x^2  \cos 2x  \sin^2 x
\sin^{-1} \frac12       ✓  \arcsin(0.5)  \frac{\pi}{6}  ✗  2  \csc\frac12
\log_2 8                ✓  3  \frac{\ln 8}{\ln 2}  ✗  2  \log_8 2  4
\log\left(\frac{2007}{2006}\right)  ✓  \log 2007-\log 2006  \ln\frac{2007}{2006}  ✗  \log(2006/2007)  1
\lg 100                 ✓  2  \log_{10} 100  ✗  10  \ln 100
e^{-1}                  ✓  \frac{1}{e}  1/e  ✗  e  -e  0.37  0
|-3|                    ✓  3  \lvert 3 \rvert  |1|+|2|  ✗  -3
|x-2|                   ✓  \left|2-x\right|  \left|-\left|x-2\right|\right|  ✗  x-2  |x|-2

# percent, currency, units, words beside numbers
10\%                    ✓  10\%  10  0.1  10%  10\text{ percent}  1/10  ✗  0.01  1  100  11\%
10                      ✓  10\%  10  10\,\%  1000\%  ✗  0.1  0.1\%  100\%
0.1                     ✓  10\%  0.1\%  0.1  ✗  10  1\%
\$18.90                 ✓  18.90  18.90 USD  18.9  \$ 18.90  $18.90  18.90\text{ dollars}  18.90 dollars  £18.90  ✗  1890  18  19
5\text{ cm}             ✓  5  5cm  5 cm  5\mathrm{cm}  5\ \mbox{cm}  5 cm.  ✗  50  5\text{ cm}+1  6
15\mbox{ cm}^2          ✓  15  15\text{ cm}^{2}  15cm^2  15 square centimeters  ✗  225  15^2  30
22.1cm^{2}              ✓  22.1  $22.1cm^{2}$  ✗  22  22.1^2
36\sqrt{7}              ✓  36\sqrt{7}cm^{3}  ✗  36\sqrt{6}cm^{3}
18 eggs per day         ✓  18  18\text{ eggs}  ✗  81
5.4 \text{ cents}       ✓  5.4  5.4 cents  ✗  54  0.054
240\text{ ways.}        ✓  240  ✗  24
145                     ✓  $145$solution:  ✗  146

# letters and words
A                       ✓  A  (A)  \text{A}  \text{(A)}  \textbf{(A)}  A.  $A$  ✗  B  (B)  \text{(B)}  a  AB
(A)                     ✓  A  \text{(A)}  ✗  B  \text{(C)}
\textbf{(C) } 12        ✓  C  \text{(C)}  12  ✗  B  (D)
C. 12                   ✓  C  (C)  ✗  B  (C) \cup (D)
\text{east}             ✓  east  East  \mathrm{east}  \text{ east }  east.  ✗  seat  west  eats  e
Evelyn                  ✓  \text{Evelyn}  evelyn  \textbf{Evelyn}  ✗  Eve  \text{Navin}  Evelyn and Navin
\text{June 20}          ✓  June 20  ✗  June 21
\text{A,C,F}            ✓  A,C,F  A, C, F  F,A,C  \text{A}, \text{C}, \text{F}  \text{A, C and F}  ✗  A,C  A,B,F  A
a necessary but not a sufficient condition  ✓  \text{a necessary but not a sufficient condition}
a necessary but not a sufficient condition  ✗  \text{a sufficient condition}
neither                 ✓  \text{neither}  ✗  \text{odd}  \text{even}
\text{Quadrant I}       ✓  $Quadrant I$  ✗  $Quadrant II$

# ordered, unordered, intervals
(1,2)                   ✓  (1,2)  (1, 2)  \left(1,2\right)  \left( \frac22, 2.0 \right)  \langle 1,2\rangle  1,2
(1,2)                   ✗  (2,1)  [1,2]  (1,2]  [1,2)  \{1,2\}  (1,2,3)  2,1  (1,-2)  12  1.2  3
1,2                     ✓  1,2  2, 1  \{1,2\}  \{2,1\}  (1,2)  1\text{ and }2  2\text{ or }1  1 and 2  x=1,x=2
1,2                     ✓  x=1\text{ or }x=2  $1$ or $2$
1,2                     ✗  (2,1)  1  2  1,2,3  1,3  1.2  [1,2]  1,1,2
\{1,2\}                 ✓  \{2,1\}  \left\{1,2\right\}  \lbrace 1, 2\rbrace  2,1
\{1,2\}                 ✗  (1,2)  [1,2]  \{1\}  \{1,3\}  \{1,2,3\}
\{-2\}                  ✓  -2  \{-2\}  ✗  2  \{2\}  \{-2,2\}
\emptyset               ✓  \varnothing  \{\}  ∅  ✗  0  \{0\}
[0,1)                   ✓  [0,1)  \left[0,1\right)  [0, 1.0)  0 \le x < 1  \{x \mid 0 \le x < 1\}
(0,e)                   ✓  0<x<e  ✗  0<x\le e  (0,1)
[0,1)                   ✗  (0,1)  [0,1]  (0,1]  0,1  [0,2)  0<x<1
(-\infty, 3]            ✓  \left(-\infty,3\right]  x \le 3  x \leq 3  3 \ge x  \{x|x\leq 3\}  x\in(-\infty,3]
(-\infty, 3]            ✗  (-\infty,3)  (\infty,3]  [3,\infty)  x<3  x \ge 3  3
x > 3                   ✓  (3,\infty)  3<x  (3,+\infty)  a>3  \{x: x>3\}  ✗  [3,\infty)  x<3  x>4  3  x=3
(-\infty,2)\cup(3,\infty)  ✓  (3,\infty)\cup(-\infty,2)  x<2\text{ or }x>3  x\in(-\infty,2)\cup(3,\infty)
(-\infty,2)\cup(3,\infty)  ✓  (-\infty,2)∪(3,∞)
(-\infty,2)\cup(3,\infty)  ✗  (-\infty,2]\cup(3,\infty)  (-\infty,2)  (2,3)  (-\infty,3)\cup(2,\infty)
\{-1\} \cup [0,7)       ✓  [0,7)\cup\{-1\}  ✗  [-1,7)  \{1\} \cup [0,7)
\mathbb{R}              ✓  (-\infty,\infty)  x\in\mathbb{R}  ✗  (0,\infty)  \mathbb{Z}
(12,3,4), (6,5.4,7.6)   ✓  (6,5.4,7.6),(12,3,4)  ✗  (12,3,4)  (3,12,4),(6,5.4,7.6)
3 \pm 2\sqrt{2}         ✓  3+2\sqrt2, 3-2\sqrt2  3-2\sqrt{2},3+2\sqrt{2}  3 \mp 2\sqrt{2}  x = 3\pm\sqrt8
3 \pm 2\sqrt{2}         ✗  3+2\sqrt2  2\pm3\sqrt2  3
\{1\pm\sqrt{5},-2\}     ✓  -2, 1+\sqrt5, 1-\sqrt5  \{-2,1-\sqrt5,1+\sqrt5\}  ✗  1\pm\sqrt5  \{1\pm\sqrt{5},2\}
\pm 2                   ✓  2,-2  \{-2,2\}  x=\pm2  -2 or 2  ✗  2  -2  \pm 3
(1,\pm 2)               ✓  (1,2),(1,-2)  ✗  (1,2)  (2,1),(-2,1)
3:2                     ✓  3:2  3/2  6:4  1.5  ✗  2:3  3  3:2:1
9:24                    ✓  9:24  09:24  9:24 a.m.  ✗  9:25  10:24
05\!:\!00               ✓  5:00  05:00  ✗  6:00  5  0
9\text{ a.m.}           ✓  9 a.m.  9am  9  9\text{ AM}  ✗  9 p.m.  9 PM  10\text{ a.m.}
4\!:\!51\!:\!06 \text{ p.m.}  ✓  4:51:06 PM  4:51:06  ✗  4:06:51 p.m.  4:51:06 a.m.  4:51

# matrices
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ✓  \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ✓  \begin{pmatrix}1.0&\frac42\\3&2^2\\\end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ✓  \left(\begin{array}{cc}1&2\\3&4\end{array}\right)
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ✗  \begin{pmatrix}1&2\\3&5\end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ✗  \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}  ✗  \begin{pmatrix}1\\2\\3\\4\end{pmatrix}  10  (1,2,3,4)
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}  ✓  \begin{pmatrix}-\frac13\\\frac23\end{pmatrix}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}  ✓  \frac13\begin{pmatrix}-1\\2\end{pmatrix}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}  ✗  \begin{pmatrix}-1/3&2/3\end{pmatrix}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}  ✗  \begin{pmatrix}2/3\\-1/3\end{pmatrix}  (-1/3,2/3)

# algebra
x^2+2x+1                ✓  (x+1)^2  1+x(x+2)  (x+1)(x+1)  x^{2}+2x+1  x\cdot x+2\cdot x+1
x^2+2x+1                ✗  (x+1)(x-1)  x^2-2x+1  y^2+2y+1  x^2+2x  (x+1)^3
p - q                   ✓  -q+p  -(q-p)  ✗  q-p  p+q  p
x-z-y                   ✓  x-y-z  ✗  xyz  x-y+z
1                       ✗  [1]
(x+1)(x-1)              ✓  [x+1][x-1]
\sin x \cos x            ✗  \sin x - \cos x  sin x - cos x
2xy                     ✓  2yx  2 \cdot x \cdot y  x\times 2y  ✗  2x+y  2x^y  xy  2ab
\frac{x^2-1}{x-1}       ✓  x+1  ✗  x-1
\frac{2ab}{a^2+b^2}     ✓  \frac{2}{\frac{a}{b}+\frac{b}{a}}  ✗  \frac{ab}{a^2+b^2}
42x\sqrt{5x}            ✓  42\sqrt{5x^3}  42\sqrt{5}x^{3/2}  ✗  42\sqrt{5x}
\sqrt{x^2}              ✓  |x|  ✗  x
a^{6}                   ✓  (a^2)^3  a^3a^3  ✗  a^5  6a  a^{-6}
1+2i                    ✓  2i+1  1 + 2 i  \frac{5}{1-2i}  ✗  1-2i  2+i  1+2  3
\sqrt{-4}               ✓  2i  ✗  2  -2
x_1+x_2                 ✓  x_{2}+x_{1}  ✗  x_1+x_3  2x
\frac{1}{4}\overrightarrow{a}  ✓  \frac{\vec{a}}{4}  0.25\mathbf{a}  ✗  \vec a  \frac14\vec b

# equations and inequalities
5                       ✓  x=5  x = 5  k=5  AB = 5  \theta=5  f(2)=5  x=\frac{10}{2}  ✗  x=6  2x=5  x+y=5  x^2=5  x>5
x=5                     ✓  5  x=5  2x=10  x-5=0  5=x  x = 2+3 = 5  ✗  x=6  y=5  x=-5  x^2=25  x=5y
y=2x+3                  ✓  2x+3  2x-y+3=0  y-3=2x  \frac{y-3}{2}=x  y = 3 + 2x  ✗  y=2x-3  x=2y+3  2x-y=3  2x+4
C(h)=4h+4               ✓  4h+4  C(h)=4(h+1)  ✗  C(h)=4h-4  C(h)=h+4
\frac{x^2}{2}-\frac{y^2}{4}=1  ✓  2x^2-y^2=4  2x^2 - y^2 - 4 = 0  ✗  \frac{x^2}{4}-\frac{y^2}{2}=1  2x^2+y^2=4
(x,y)=(1,2)             ✓  (1,2)  x=1,y=2  ✗  (2,1)  x=2,y=1
2x+y<4                  ✓  y<4-2x  4>2x+y  4x+2y<8  ✗  2x+y>4  2x+y\le 4  2x+y=4
b>a>c                   ✓  c<a<b  b > a > c  ✗  a>b>c  c>a>b  b\ge a\ge c
x \ne 2                 ✓  x\neq 2  ✗  x=2  x\ne 3
\{x|x=3k,k\in \mathbb{Z}\}  ✓  \{ x \mid x = 3k, k \in \mathbb{Z} \}  ✗  \{x|x=2k,k\in \mathbb{Z}\}
\{2k:k\in\mathbb{Z}\}   ✗  \{3k:k\in\mathbb{Z}\}
\{2k \mid k \in \mathbb{Z}\}  ✓  \{2k \mid k \in \mathbb{Z}\}  ✗  \{3k \mid k \in \mathbb{Z}\}

# bases
2_{5}                   ✓  2_5  ✗  2_6  2  12_5
204_5                   ✓  204_{5}  ✗  54  204  204_6  205_5
204                     ✓  204_5  ✗  205_5  54_5
24                      ✓  24_{10}  ✗  25_{10}
-221_{3}                ✓  -221_3  x=-221_3  ✗  221_3  -222_3

# statements about numbers, and identities
3=4                     ✓  4  ✗  3  x=5  y=4x
1<2                     ✗  2x+y<4  (1,2)  x<2  2
z-i=0                   ✓  z=i  2z=2i  ✗  z=1  z=-i
2y=2\sqrt{x-100}        ✓  y=\sqrt{x-100}  ✗  y=\sqrt{x}
\frac{12}{6}=\frac{7}{2}  ✓  \frac72  ✗  2  x=2
\log_2 8=3              ✓  3  ✗  x=5  y=2x+3
\log_2 8=3,1            ✗  x=5,1
\cos 60^\circ=\frac12   ✗  y=2x+3  x=5
\log_2 8>3              ✗  2x+y>4  x>3
x=x                     ✗  y=y  x=5
\sin\pi                 ✓  0  ✗  e^{-100}  e^{-1000}
0                       ✗  e^{-100}  e^{-1000}  10^{-300}

# percent and degree signs: gold decides
3+0\%1                  ✗  3  4  3.01
3+0\%                   ✓  3  ✗  4
3+10\%                  ✓  3.1  ✗  13
1\%2                    ✗  2  0.02  1
x+0\%1(y-x)             ✗  x  y
50\%                    ✓  50  0.5  \frac12  50\%  ✗  5  2  5000\%
1\%                     ✓  1\%  0.01  ✗  1  100
100\%                   ✓  1  100\%  100  ✗  10000
-10\%                   ✓  -10  -0.1  ✗  10
10\%, 20\%              ✓  10,20  0.1,0.2  ✗  10,0.2,30
30^\circ                ✓  30  \frac{\pi}{6}  ✗  0.5  \pi
180^\circ               ✓  \pi  180  ✗  3.14
\frac{360^\circ}{7}     ✓  \frac{360}{7}  \frac{2\pi}{7}  ✗  360  \frac{360}{7}\pi
90^\circ-x              ✓  \frac\pi2-x  ✗  90-x

# choices
\text{(A)} B            ✗  A  B
A. B. C. D.             ✗  A  B  D
(A) and (B)             ✗  A  B
A or B                  ✗  A  B
A, B                    ✗  A  B
A. 5                    ✓  A  5  ✗  B  6

# subscripts, chains, left sides
\log_{2}8               ✓  3  \log_28  ✗  8  \log_{28}1
x_{1}2                  ✓  2x_1  ✗  x_{12}  x_12
x_{12}                  ✓  x_12  ✗  x_{1}2  x_1
I_p                     ✓  I_{p}  I_{\mathrm{p}}  ✗  I_q  Ip
a_n=2n+1                ✓  a_{n}=2n+1  2n+1  ✗  a_{n}=2n
k_B                     ✓  k_{\mathrm{B}}  k_{\text{B}}  ✗  k_A
x_2^2                   ✓  x^{2}_{2}  ✗  x_2  x^2
\frac{\sqrt3}3          ✓  \frac{\sqrt3}3\approx0.577  ✗  0.577
\frac{\sqrt3}3\approx0.577  ✓  \frac{\sqrt3}3  ✗  0.577  0.58
2^{10}=1024             ✓  1024  ✗  10
24*24 = 576             ✓  576  ✗  24
x = 5+5+1 = 1/3 \approx 11  ✓  x=1/3  1/3  ✗  11  5  x=11
0.56                    ✓  0.56 = 56\%  ✗  0.57 = 57\%
\frac23                 ✓  \$\dfrac23 \approx \$0.67  ✗  0.67
x \approx 8.24          ✓  8.24  ✗  8
100 \approx 104         ✓  100  ✗  104
1                       ✓  |AB|=1  A:B=1  ✗  2x=1  |AB|=2
2                       ✓  2=x  x=2  ✗  2=3x
\frac1{\sqrt6}          ✓  \frac{NO}{BO}=\frac1{\sqrt6}  ✗  \frac{NO}{BO}=\sqrt6
y=2x+3                  ✓  f(x)=2x+3  ✗  f(x)=2x
f^{-1}(x)=2x            ✓  2x  ✗  x  3x
P(X=3)=\frac12          ✓  \frac12  ✗  3
f(x,y)=x+y              ✓  x+y  ✗  x-y

# decimals that repeat, functions, operators
0.\overline{3}          ✓  \frac13  0.\overline{33}  ✗  0.3  \frac{3}{10}
0.1\overline{6}         ✓  \frac16  ✗  0.16  \frac{16}{99}
0                       ✗  0.\overline{36}  f(0)  h(0)  g(x)
0.\overline{1}          ✗  0.\overline{2}  0.1  1
f(1)                    ✗  f  1  f(2)
f(2x)                   ✗  2f(x)  2x  f(x)
\operatorname{lcm}(6,4)  ✓  \operatorname{lcm}(6,4)  ✗  \operatorname{gcd}(6,4)  (6,4)  12
\mathrm{arctan}(5)      ✓  \arctan 5  ✗  5
2\text{i}               ✓  2i  ✗  2  2j
\sinh(2x)               ✓  2\sinh x\cosh x  ✗  2\sinh x
\lfloor x/2\rfloor      ✗  \frac{\lfloor x\rfloor}2  x/2
\frac{dy}{dx}           ✓  dy/dx  ✗  \frac yx  \frac{dx}{dy}
\sum_{k=1}^n k          ✗  \sum_{k=1}^n n  \sum_{k=0}^n k  n
\frac{n!}{k!(n-k)!}     ✓  \binom{n}{k}  ✗  \frac{n!}{k!}
(n+1)!                  ✓  (n+1)n!  ✗  n!+1

# words and units beside numbers
n\text{ is odd}         ✗  n\text{ is even}
5\text{ north}          ✓  5 north  ✗  5\text{ south}  5
\text{at least }5       ✗  \text{at most }5  5
\text{-}5               ✓  -5  ✗  5
5\text{ million}        ✓  5000000  5 million  ✗  5  5\text{ billion}
5 sin x                 ✓  5\sin x  ✗  5
5 xyz                   ✓  5xyz  ✗  5
\frac{1}{2}mg           ✗  \frac12
\pi r^2                 ✗  \pi r^{2}\,h  \pi
5\,m                    ✓  5  5\text{ m}  ✗  5n
\text{June 20}          ✗  20  \text{July 20}
\text{Area}=5           ✓  5  ✗  6
5\text{ cm}6            ✗  56  30  5
Yes                     ✓  yes  \text{Yes}  ✗  No
on                      ✗  no  No
No                      ✓  no  \text{no}  ✗  On
33.5 pct                ✓  33.5  0.335  ✗  33
10weeks                 ✓  10  ✗  1
3s                      ✗  3
81                      ✓  81\mathrm{~km}/\mathrm{hr}  81 km per hour  81 m/s  ✗  8.1
6.2 cm, 3 cm            ✓  6.2,3  ✗  6.2
\text{Softball, Kickball}  ✓  Kickball, Softball  ✗  Softball
plus minus plus         ✓  plus minus plus  \text{plus minus plus}  ✗  20  plus minus  plus plus minus
plus minus plus or plus plus plus  ✗  plus minus plus  plus plus plus
plus minus \text{plus}  ✗  plus minus plus  plus minus
20                      ✗  plus minus plus
'ba'                    ✗  'ab'  'b a'
["a", "b"]              ✓  ['a','b']  ✗  ['a ','b']  ['b','a']

# times of day and ratios
1:15                    ✓  01:15  ✗  2:30  1/14
1/3                     ✓  1:3  ✗  \text{1:03 PM}
20:34:00                ✓  20:34  ✗  20:34:01
16:10                   ✓  8:5  ✗  5:8

# signs of variables
x+3                     ✗  |x+3|
5-x                     ✗  |x-5|
\ln x                   ✓  \ln(x)  ✗  \ln|x|
\sqrt[3]{x^2}           ✓  x^{2/3}  ✗  x^{3/2}
1+\sqrt2,-1-\sqrt2      ✗  \pm1\pm\sqrt2
\pm1,\pm2               ✓  1,-1,2,-2  ✗  1,2  \pm1

# names in lists, and inequalities
y=1,x=2                 ✓  x=2,y=1  (2,1)  ✗  (1,2)
2,1                     ✓  x=2,y=1  ✗  x=1,y=2
x<3\text{ and }x>5      ✗  (-\infty,3)\cup(5,\infty)
x<3\text{ or }x>5       ✓  (-\infty,3)\cup(5,\infty)

# other spellings
2^6 3^5 5^4             ✓  2^{6}\cdot 3^{5}\cdot 5^{4}  ✗  2^{63}
2.314814814815\times10^{-3}  ✓  \frac1{432}  ✗  \frac1{431}
1.4142135623730951      ✓  \sqrt2  ✗  1.414213562373095
½                       ✓  0.5  \frac12  ✗  2
x⁴                      ✓  x^4  ✗  4x
\left\vert x\right\vert  ✓  |x|  ✗  x
\begin{cases}x=1\\y=2\end{cases}  ✓  (1,2)  ✗  (2,1)
\overline{z}            ✗  z

# what a search for hedges found
3. 4                    ✗  12  3.4
12 .5                   ✗  6  12.5
3\quad 4                ✗  34  12
A. 1B                   ✗  A  B
(A) 1B                  ✗  A  B
A. BC                   ✗  A  BC  B
\textbf{(C)}\ 5         ✓  C  5  ✗  B
Option C                ✓  C  ✗  O
(x,y)=(1,2)             ✓  (x,y)=(\frac22,2)  ✗  (x,y)=(1,3)  x+y=3
\binom{5}{2.5}          ✗  0  10
3 dozen                 ✓  36  ✗  3
3\text{ million dollars}  ✓  3000000  ✗  3
3\text{ squared}        ✗  3
3\text{ cubed}          ✗  3
3\text{ factorial}      ✗  3
3\text{ tenths}         ✗  3
3\text{ halves}         ✗  3
5\text{ below}          ✗  5
20\%\text{ increase}    ✓  20  20\%  ✗  20\%\text{ decrease}
0.(3)                   ✓  \frac13  ✗  0  3
0.\overline{3}4         ✗  \frac43  \frac13
\overline{3+4i}         ✗  3+4i
\frac{1}{12}ml^2        ✓  \frac{ml^2}{12}  ✗  \frac{1}{12}
\frac{1}{2}\,g          ✓  \frac12 g  ✗  \frac12
\frac{1}{2}abcd         ✗  \frac12
3 cm - x                ✗  3
5 in x                  ✗  5
3/4                     ✗  3:04
3,4                     ✗  3<x<4
|xy|                    ✗  xy
\frac{|x|}{x}           ✗  \frac{|y|}{y}
|x-20|                  ✗  20-x  x-20
\ln\sqrt{x^2}           ✗  \ln x  \ln(-x)
e^{200}+3-e^{200}       ✓  3  ✗  0
p(x)                    ✗  px
f'(x)=2x                ✓  2x  ✗  f(x)=x^2
9 (apples)              ✓  9  ✗  9a
18^\circ\text{C}        ✓  18  18°C  ✗  18C
18/hour                 ✓  18  18 per hour  ✗  \frac{18}{h}
P(A\cap B)=\frac12      ✓  \frac12  ✗  2
5 \neq 4 = 3            ✗  3  4  5
e^{x^3}                 ✓  (e^x)^{x^2}  ✗  e^{3x}

# never right
\text{}                 ✗  0  1
?                       ✗  5
nan                     ✗  0  5
1/0                     ✗  0  \infty  1
inf                     ✗  5
The answer is 5         ✗  6
\frac{}{}               ✗  1  0
()                      ✗  0
x                       ✗  5  y  2x

# Python literals
\text{'hello'}           ✓  'hello'  "hello"  ✗  'Hello'
\{'a': 1\}               ✓  {'a': 1}  ✗  {'a': 2}
{'b': 2, 'a': 1}        ✓  {'a': 1, 'b': 2}
{1: 1, 2: 2}            ✓  {2: 2, 1: 1}  ✗  {3: 3, 4: 4}
'a, b'                  ✗  'a,b'
[ ]                     ✓  []  ✗  {}  ['']
[{}]                    ✓  [{}]  ✗  [[]]

# roots and choices
x_1 = 3, x_2 = -2       ✓  -2,3  \{-2,3\}  (3,-2)  ✗  (-2,3)  -2,4
\textbf{(B)}~5          ✓  B  5  ✗  C
(B)\; 5                 ✓  B  ✗  D
\text{(B)}\quad 5       ✓  B  ✗  A
(B): 5                  ✓  B  ✗  A
\text{Option B}         ✓  B  ✗  A
1 day                   ✓  1  ✗  11
1/2 cup                 ✓  1/2  0.5  ✗  2
"""


def table() -> list[tuple[str, str, bool]]:
    rows = []
    for line in TABLE.splitlines():
        if line and not line.startswith("#"):
            answer, *cells = re.split(r" {2,}", line)
            for cell in cells:
                if cell in "✓✗":
                    verdict = cell == "✓"
                else:
                    rows.append((answer, cell, verdict))
    return rows


ROWS = table()

# Text from a model that must be graded wrong against 5, fast, without an exception.
HOSTILE = [
    # brackets, commands and signs without end
    "{" * 10_000, "}" * 10_000, "{" * 400 + "5" + "}" * 400, "(" * 500 + ")" * 500, "|" * 999, "x_{" * 300, "x_" * 400,
    r"\frac" * 200, r"\sqrt" * 190 + "2", r"\boxed{" * 100, r"\text{" * 160, "$" * 1_000, r"\frac{1}{", r"\frac{}{}",
    "-" * 989 + "5", "!" * 999, "5" + "!" * 900, "1" + "%" * 990, r"\sin" * 240 + "x", r"\begin{pmatrix}" * 60,
    r"\begin{pmatrix}" + "1&" * 450, r"\begin{pmatrix}" + r"1\\" * 300 + r"\end{pmatrix}",
    # long sums, products, lists and chains
    "1" + "+1" * 490, "x" + "+x" * 490, "x" * 1_000, "(x+1)" * 190, "1" + "/3" * 490, "1," * 499 + "1", "1,000" * 200,
    r"\pm1," * 160 + "1", ",".join(map(str, range(100, 340))) + r",\pm1", ":".join("1" * 450), "a<" * 400 + "b",
    "a" * 500 + "=" + "b" * 400, r"\sin x" * 160, r"\sin(x)^{\cos(x)}" * 55, "6" + r",\!000" * 160 + "1",
    # numbers too large to compute
    "9**9**9**9", "9^{9^{9^9}}", "2^" * 490 + "2", "9" * 100_000, "9" * 999, "0." + "9" * 990, "1e9999", "1e99999999",
    "10^{10^{10}}", "e^{99999}", "e^{e^{e^{e^e}}}", "x_{3^{12000}}", r"\sin(10^{5000})", r"\sqrt[999999999]{2}",
    "9" * 900 + "!", "99999999!", "1999!" * 190, "1999!/" * 150 + "3", "((x+1)^99)^99" + "(x)" * 100,
    r"\binom{1000000000}{500000000}", r"\binom{1999}{999}" * 58, "2^{19000}/3^{11000}" * 50, "3^{12000}+" * 90 + "1",
    "(3^{6000}/7^{3000})+" * 45 + "1", r"\frac{1}{3^{9000}}+" * 50 + "1", r"\sin(3^{12000})" * 66,
    r"\exp(3^{12000})" * 60, "x^{x^{x^{x^x}}}" * 50, "(1+i)^{1999}" * 80,
    # undefined
    "1/0", "0^{-1}", r"\frac{0}{0}", r"\infty-\infty", r"0\cdot\infty", r"\infty=\infty", r"\sqrt[0]{5}", r"\log 0",
    r"\sqrt[-1]{0}", r"\log_1 5", "nan", "inf", "-inf", "zoo", "oo",
    # code and format strings
    "__import__('os').system('exit 1')", "exec('raise')", "(lambda: 5)()", "[].__class__.__base__", "Integer(5)",
    "Symbol('x').func", "S(5).subs", "{{7*7}}", "${5}/{0}", "%s%n%d",
    # characters
    "\x00" * 500, "5\x00\x00", "\ud800", "½" * 300, "٥", "²³¹", "ﬁve", "😀" * 200, "\u202e5\u202c" * 100,
    # texts that make a regular expression backtrack
    " " * 499 + "a" + " " * 499, "5 " + "a-" * 495, "a.m. " * 190, "1 " * 490 + "1/2", r"\{x\in" * 160, "." * 998 + "a",
    r"1\frac{1}" * 110, "(A). " * 199,
]
GOLDS = ["5", r"\{1\pm\sqrt{5},\frac{x}{2},7\%\}"]


def slowest(texts: list[str]) -> float:
    """Grades every text uncached and asserts that it is wrong; returns the seconds of the slowest."""
    seconds = []
    for text in texts:
        for gold in GOLDS:
            grade._equivalent.cache_clear()
            grade._readings.cache_clear()
            start = time.thread_time()  # grading only computes, and other processes' load is not its time
            assert equivalent(text, gold) is False, (text[:50], gold)
            extract_answer(text + r"\boxed{" + text)
            parsable(text)
            seconds.append(time.thread_time() - start)
    return max(seconds)


@pytest.mark.parametrize("answer, gold, verdict", ROWS)
def test_equivalent_table(answer, gold, verdict):
    assert equivalent(answer, gold) is verdict


def test_formulas_without_common_points_are_not_equal():
    """Also as equations, whose ratio then has no value."""
    nan, one = latex.MP.nan, Fraction(1)
    a, b = (latex.Number(tuple(one if k % 2 == half else nan for k in range(latex.POINTS))) for half in (0, 1))
    zero = latex.Number((Fraction(0),))
    assert not grade._same(a, b)
    assert not grade._same(latex.Group("=", (a, zero)), latex.Group("=", (b, zero)))


@pytest.mark.parametrize("gold", ["5", "", "x", r"\text{A}"])
def test_equivalent_none_and_blank_are_wrong(gold):
    assert not any(equivalent(answer, gold) for answer in (None, "", " ", "\n"))


def test_equivalent_ignores_space_around():
    assert equivalent("72", " 72 ") and equivalent("\n72 ", "72")


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{5}.", "5"),
    (r"\boxed{1}, then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\fbox{7}", "7"),
    (r"\boxed{5} and \fbox{6}", "6"),
    (r"$\boxed 5$.", "5"),
    (r"\boxed 12.", "12"),
    (r"\boxed {17}", "17"),
    (r"\boxed \frac{1}{2}", r"\frac{1}{2}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{ 5 }", "5"),
    (r"\boxed{\text{(A)}}", r"\text{(A)}"),
    *[(text, None) for text in (r"\boxed{}", r"\boxed{ }", r"\boxed{5", r"\boxed{5} \boxed{6", r"\boxed{{5}", r"\boxed",
                                "", "the answer is 5", r"\boxedfoo{5}", "boxed{5}", r"\boxed{1}\boxed{}")]])
def test_extract_answer_table(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("gold", ["5", r"\frac{1}{2}", r"\text{east}", r"\{\}", "A", r"\left\{ x \right."])
def test_parsable_accepts(gold):
    assert parsable(gold)


@pytest.mark.parametrize("gold", ["", "  ", "$$", r"\text{}", r"\frac{1}{2", "5}", "}{", "...", "9" * (MAX_CHARS + 1),
                                  None, 5])
def test_parsable_refuses(gold):
    assert not parsable(gold)


def test_hostile_text_is_wrong_and_fast():
    assert len(HOSTILE) >= 50
    seconds = slowest(HOSTILE)
    print(f"slowest of {len(HOSTILE)} hostile texts: {seconds:.3f} s")
    assert seconds < SECONDS


def test_hostile_text_deep_in_the_stack():
    def descend(frames):
        return equivalent("(" * 25 + "x" + ")" * 25, "2x") if frames == 0 else descend(frames - 1)

    grade._readings.cache_clear()
    for frames in range(700, 960, 20):
        try:
            assert descend(frames) is False
        except RecursionError:  # ours to descend() itself, not the grader's
            assert frames > 900


def test_modules_do_not_evaluate_text():
    """No name in the modules can run or import what a model wrote, and importing them loads neither sympy nor torch."""
    source = "".join(Path(module.__file__).read_text() for module in (grade, latex, spelling))
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__", "sympify", "parse_expr", "parse_latex", "getattr", "signal"}
    code = "import sys, s2r.grade; print(any(name in sys.modules for name in ('sympy', 'torch')))"
    root = Path(__file__).parents[1]
    output = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


# --- properties: one meaning per answer ---

NUMBERS = (st.integers(-99, -1) | st.integers(2, 999)).map(str) | st.tuples(st.integers(1, 50), st.integers(51, 99)).map(
    lambda pair: r"\frac{%d}{%d}" % pair)  # neither 0 nor 1, which a product can keep

PIECES = st.sampled_from([*"0123456789xyzabefiAB+-*/=<>^_{}()[]|,;:!%°$ .\\'\"", "12", "1,000", "0.5", r"\frac", r"\sqrt", r"\pi",
                          r"\text{", r"\pm ", r"\%", r"^\circ", r"\infty", r"\cup", r"\in", r"\approx", r"\le ", r"\log_", r"\sin ",
                          r"\binom", r"\left(", r"\right)", r"\overline{", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "&", " and ",
                          " or ", " cm", " east", "no", "½", "²", "√", "f(x)", "P(X=1)", " p.m.", "\\,", r"\operatorname{lcm}"])
TEXTS = st.lists(PIECES, min_size=1, max_size=14).map("".join)


@settings(max_examples=3_000, deadline=None, derandomize=True)
@given(TEXTS | st.text(max_size=30), TEXTS | st.text(max_size=30))
def test_equivalent_never_raises(answer, gold):
    try:
        grade._equivalent.__wrapped__(answer, gold)  # not `equivalent`, which would hide a RecursionError
    except latex.Unreadable:
        pass
    assert equivalent(answer, gold) in (True, False)


@settings(max_examples=2_000, deadline=None, derandomize=True)
@given(TEXTS, TEXTS)
def test_equivalent_is_symmetric_but_for_what_gold_decides(answer, gold):
    decided = re.compile(r"[%°_]|circ|,\d{3}|[A-Z]")  # signs, bases, thousands, choices
    if not decided.search(answer + gold):
        assert equivalent(answer, gold) == equivalent(gold, answer)


TAILS = ["x", r"\pi", r"\sqrt{2}", r"\,y", ", {}", r"\text{ or }{}", " or {}", r"\text{ and }{}", r"\approx {}", r"\pm {}", ";{}",
         r"\cup {}", "_{}", r"\% {}", r"^\circ {}", r"\quad {}", r"\text{ cm}{}", r"\text{ }{}", " cm {}", r"\newline {}", r"\ne {}", "<{}", r"\in {}", r"\text{ not }{}", " not", " million", " north", " or more", r"\text{ less than}", " east {}"]


@pytest.mark.parametrize("tail", TAILS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(NUMBERS, NUMBERS)
def test_what_is_appended_never_makes_a_wrong_answer_right(tail, answer, gold):
    """Neither a factor that no rational number has, nor a second answer (gold itself), nor a word that decides."""
    if not equivalent(answer, gold):
        assert not equivalent(answer + tail.replace("{}", gold), gold)
        assert not equivalent(answer + tail.replace("{}", gold), answer) or tail in (r"\approx {}", " million")


HEDGES = ["{} or {}", "{} and {}", "{}, {}", "{}; {}", "{}={}", "x={}={}", r"{}\approx {}", r"{}\text{{ or }}{}", "({}) {}", "{} ({})",
          r"\text{{{}}}{}", r"{}\text{{{}}}", "{}/{}", "{}:{}", r"{}\pm {}", r"\pm {}, {}", r"\{{{},{}\}}", "({},{})", "[{},{}]", "{}_{}",
          "{}^{}", r"{}\cup {}", "{}<{}", "{}<x<{}", r"{}\% {}", "{} {}", r"\frac{{{}}}{{{}}}", "{}!{}", r"{}\quad {}", "|{}|{}",
          r"x={}\text{{ and }}x={}", r"\begin{{pmatrix}}{}\\{}\end{{pmatrix}}", r"{}\\{}", "({}), ({})", "(A) {} (B) {}", "{} cm {}",
          "{}, not {}", "{} (or {})", r"\boxed{{{}}}{}", "{}\n{}", "{}|{}", "{}&{}", "{}_{{{}}}", "f({})={}", "{}.{}", "{},{}", "{}x+{}"]
GOLDS_OF_TWO = [("3", "4"), ("12", "-5"), (r"\frac12", r"\frac13"), ("x", "y"), ("A", "B"), ("7", r"\sqrt2"), ("100", "200"),
                (r"\text{east}", r"\text{west}"), ("(1,2)", "(2,1)"), ("0", "1"), ("0.5", "50")]


@pytest.mark.parametrize("hedge", HEDGES)
@pytest.mark.parametrize("golds", GOLDS_OF_TWO)
def test_a_hedge_is_not_right_for_both(hedge, golds):
    assert not all(equivalent(hedge.format(*golds), gold) for gold in golds)
    assert not all(equivalent(hedge.format(*reversed(golds)), gold) for gold in golds)


SPELLINGS = [  # of a number, as models write it
    "{}", " {} ", "${}$", r"\({}\)", r"x={}", r"x = {}", r"{}\text{{ cm}}", r"{} dollars", r"\${}", r"{}.", r"\left({}\right)", r"\boxed{{{}}}",
    r"{{{}}}", r"{}\,\text{{units}}", r"\text{{The answer is }}={}", r"{}\ \mathrm{{kg}}", r"{} \quad", r"=  {}", r"\displaystyle {}"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("number, same, other", [
    ("12", r"\frac{24}{2}", "13"), ("-3", "-3.0", "3"), (r"\frac{3}{4}", "0.75", r"\frac{4}{3}"), ("1000", "1,000", "100"),
    (r"2\sqrt{3}", r"\sqrt{12}", r"3\sqrt{2}"), ("0.5", r"\frac12", "0.05"), (r"\frac{\pi}{4}", r"\pi/4", r"\pi")])
def test_a_right_answer_in_another_spelling_stays_right(spelling, number, same, other):
    written = spelling.format(number)
    written = extract_answer(written) if "boxed" in written else written
    assert equivalent(written, number) and equivalent(written, same) and not equivalent(written, other), written


def rows(name: str) -> list[dict]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.open()]


def some(name: str) -> list[dict]:
    """All rows of a file, or of a large one every tenth, and those with an empty answer."""
    found = rows(name)
    return [row for i, row in enumerate(found) if len(found) < 1000 or i % 10 == 0 or not row["answer"]]


FILES = ["math500.jsonl", "math_train.jsonl", "gsm8k_test.jsonl", "gsm8k_train.jsonl", "aime24.jsonl", "amc23.jsonl",
         "gaokao2023en.jsonl"]
EMPTY = {"train/number_theory/7115.json", "train/number_theory/7117.json", "gaokao2023en/167", "gaokao2023en/192"}


@pytest.mark.parametrize("name", FILES)
def test_gold_is_parsable_and_equals_itself(name):
    for row in some(name):
        gold = row["answer"]
        assert parsable(gold) is (row["unique_id"] not in EMPTY), row
        if gold:
            assert equivalent(gold, gold) and equivalent(f" {gold} ", gold), gold


def test_gold_is_read_as_mathematics():
    """Of MATH's golds nearly all are understood, not merely compared as text."""
    golds = sorted({row["answer"] for row in some("math_train.jsonl") + some("math500.jsonl")} - {""})
    unread = [gold for gold in golds if not grade._readings(grade.spell(gold), True)]
    print(f"unread: {len(unread)} of {len(golds)}: {unread}")
    assert len(unread) <= 0.002 * len(golds)


@pytest.mark.parametrize("name", ["math_train.jsonl", "math500.jsonl"])
def test_extract_answer_finds_the_gold(name):
    problems = [row for row in some(name) if row["answer"]]
    right = sum(equivalent(extract_answer(row["solution"]), row["answer"]) for row in problems)
    print(f"{name}: extracted answer equals gold in {right} of {len(problems)}")
    assert right >= 0.999 * len(problems)


def respell(gold: str, rng: random.Random) -> str:
    """The same answer, written otherwise."""
    ways = [
        gold.replace(r"\frac", r"\dfrac"),
        gold.replace(" ", ""),
        re.sub(r"(?<![\d ])\\frac\{(\d+)\}\{(\d+)\}", r"(\1/\2)", gold),
        re.sub(r"\\text\{([^{}]*)\}", r"\1", gold),
        re.sub(r"\\sqrt\{(\d+)\}", r"\\frac{\\sqrt{4\\cdot \1}}{2}", gold),
        re.sub(r"\\left|\\right", "", gold),
        gold + r"\,",
        gold if "=" in gold or r"\t" in gold else "x = " + gold,
    ]
    return rng.choice([way for way in ways if way != gold])


def spoil(gold: str, rng: random.Random) -> str:
    """A near miss: one digit raised by one."""
    digits = [match.start() for match in re.finditer(r"\d", gold)]
    if not digits:
        return gold + "+1"
    k = rng.choice(digits)
    return gold[:k] + str((int(gold[k]) + 1) % 10) + gold[k + 1:]


def test_agreement_with_math_verify():
    """Of every file: 20 gold answers with themselves, 24 respelled, 12 with a digit changed, 8 with another gold."""
    math_verify = pytest.importorskip("math_verify")
    rng = random.Random(0)
    agreed, total = 0, 0
    for name in FILES:
        golds = sorted({row["answer"] for row in rows(name)} - {""})
        makers = [lambda gold: gold] * 20 + [lambda gold: respell(gold, rng)] * 24
        makers += [lambda gold: spoil(gold, rng)] * 12 + [lambda gold: rng.choice(golds)] * 8
        pairs = [(make(gold), gold) for make in makers for gold in [rng.choice(golds)]]
        same = 0
        for answer, gold in pairs:
            dollars = [text if "$" in text.replace(r"\$", "") else f"${text}$" for text in (gold, answer)]
            ours, theirs = equivalent(answer, gold), math_verify.verify(*map(math_verify.parse, dollars))
            same += ours == theirs
            if ours != theirs:
                print(f"ours {ours}, math-verify {theirs}: {answer!r} for {gold!r}")
        print(f"{name}: agreement with math-verify on {same} of {len(pairs)} pairs")
        agreed, total = agreed + same, total + len(pairs)
    assert agreed >= 0.95 * total
