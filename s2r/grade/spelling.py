r"""One spelling for what LaTeX and prose write in many ways: `$\dfrac12\,\text{ cm}^2$` becomes `\frac{1}2 "cm"`.

Words end up in double quotes, so that the parser can tell a unit from a product of letters. A word is what stands in
\text{…}, a unit of _UNITS, or anything that looks like English: four letters or more (five after a digit), with a vowel.
"""

import re

from s2r.grade.latex import FUNCTIONS

_UNITS = set("""cm mm km dm nm kg gm ml lb lbs oz ft mi yd sq cc hr hrs min mins sec secs mph kph am pm in men per usd
    USD no No day cup egg yr yrs wk gal mL mg""".split())
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": "<=", "≥": ">=",
    "≠": "!=", "∪": r"\cup ", "∈": r"\in ", "√": r"\sqrt ", "º": "°", "∅": r"\emptyset ", "≈": r"\approx ", "½": r"\frac12 ",
    "¼": r"\frac14 ", "¾": r"\frac34 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "，": ",", "（": "(", "）": ")", "£": " ",
    "€": " ", "¥": " ", "~": "  ", '"': "'"})
_JOINTS = re.compile(r"(?<!\\)\b(and|or)\b")


def _text(match: re.Match) -> str:
    r"""\text{…} as words in quotes; or, for symbols, digits and single letters, as it stands."""
    words = match[1].strip()
    if re.fullmatch("[mgshLlJNWV]", words) and re.search(r"[\d})]\s*$", match.string[: match.start()]):
        return f'  "{words}"'
    if re.search(r"\d|[A-Za-z]\)", words):
        return f" {words} "
    return " " + re.sub(r"(?<!\\)\b[A-Za-z][A-Za-z\s.'/-]*[A-Za-z]", r'"\g<0>"', _JOINTS.sub(r" \\\1 ", words)) + " "


def _bare(match: re.Match) -> str:
    """A run of bare words: put in quotes if the first is a unit or looks like English, else left as it is."""
    if match[0][0] in '"\\':
        return match[0]
    word, before = match[1].lower(), match.string[: match.start()]
    unit = match[1] in _UNITS and (not before.rstrip().endswith("}") or word in ("cm", "mm", "km", "dm", "kg"))
    english = len(word) >= (5 if before[-1:].isdigit() else 4) and re.search("[aeiou]", word) and word not in FUNCTIONS
    return f' "{match[0]}"' if unit or english and word != "infty" and before[-1:] != "}" else match[0]


_REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}"),
    (r"\\\\", r"\\newrow "),
    (r"\\left\s*(?:\||\\vert)|\\lvert", r"\\lvert "), (r"\\right\s*(?:\||\\vert)|\\rvert", r"\\rvert "), (r"\\vert", "|"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])\.?|\\[()]|\\\[|\\\]|\\?\$", " "),
    (r"(?<=\d)\s*(?:\{,\}|,\s*\\!|\\[,;: ])\s*(?=\d{3}(?!\d))", ""),  # thousands: 1{,}000  1,\!000  1\,000
    (r"^\s*[1-9]\d{0,2}(?: \d{3})+\s*$", lambda match: match[0].replace(" ", "")),
    (r"\\!", ""),
    (r"\\[,;:> ]|\\q?quad(?![A-Za-z])|\\phantom\s*\{[^{}]*\}", "  "),
    (r"\\[dtc](frac|binom)", r"\\\1"),
    (r"\\pm(?![A-Za-z])", "±"), (r"\\mp(?![A-Za-z])", "∓"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degrees?(?![A-Za-z])", "°"),
    (r"°\s*(?:\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|[CF]\b)", " "),
    (r"\\%|(?<=\d)\s*(?:(?:percent|pct)\b|\\text\s*\{\s*(?:percent|pct)\s*\})", "%"),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times "),
    (r"\\(?:mathbf|boldsymbol|mathrm|mathit)\s*\{([A-Za-z])\}", r"\1"),
    (r"(?i)(?<=\d)\s*(?:\\text\s*\{\s*([ap])\.?\s?m\.?\s*\}|([ap])\.?\s?m\b\.?)",
     lambda match: f' "{(match[1] or match[2]).lower()}m"'),
    (rf"\\(?:operatorname|mathrm|text)\s*\{{\s*({'|'.join(FUNCTIONS)})\s*\}}", r"\\\1 "),
    (r"\\(?:text[a-z]*|mbox|mathrm)\s*\{([^{}]*)\}", _text), (r"(?<=[\d}])\s+m/s\b", ' "m/s"'),
    (_JOINTS.pattern, r" \\\1 "), (r",\s*(?=\\(?:and|or)\b)", " "),
    (r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?\s*|\((?=\d+\)))(\d+)\s*[})]?(?!\s*\d)",  # 0.1\overline{6} is (16 - 1)/90
     lambda match: rf"\frac{{{int(''.join(match.groups())) - int('0' + match[1] + match[2])}}}"
                   rf"{{{'9' * len(match[3])}{'0' * len(match[2])}}}"),
    (r"\\(?:overline|bar)\s*(?:\{\s*([a-z])\s*\}|([a-z])\b)", r"\1\2_{bar}"),  # the conjugate of z, the mean of x
    (r"\\overline\s*(?=\{[A-Z]+\})|\\(?:overrightarrow|vec|hat|mathbf|boldsymbol|underline|angle|triangle)(?![A-Za-z])", " "),
    (r"\\mathbb\s*\{?R\}?", r"(-\\infty,\\infty)"),
    (r"(?s)\\begin\s*\{cases\}(.*?)\\end\s*\{cases\}", lambda match: match[1].replace(r"\newrow", ",")),
    (r"\\begin\s*\{(?:[pbB]|small)?matrix\}|\\begin\s*\{array\}\s*\{[lcr|]*\}", r"\\matrix "),
    (r"(?:\\newrow\s*)?\\end\s*\{(?:[pbB]|small)?(?:matrix|array)\}", r"\\endmatrix "),
    (r"(?<![\w./^}])([1-9]\d*)\s*\\frac\s*(\d|\{\d+\})\s*(\d|\{\d+\})", r"(\1+\\frac\2\3)"),  # 1\frac45
    (r"(?<![\d./^_])([1-9]\d*)\s+(\d+/\d+)", r"(\1+\2)"),  # 1 4/5
    (r"\\frac\s*\{d([A-Za-z])\}\s*\{d([A-Za-z])\}|\bd([a-z])/d([a-z])\b", r"\1\3_{d\2\4}"),
    (r"\\(frac|binom)\s*(\d)", r"\\\1{\2}"),  # \frac12
    (r"(?<=\^\d)\s+(?=\d)", r"\\cdot "), (r"\\log_(\d)(\d+)(?=\s*[=,]|$)", r"\\log_\1 \2"),
    (r"(\^\s*(?:\{[^{}]*\}|\w))\s*(_\s*(?:\{[^{}]*\}|\w))", r"\2\1"),  # x^2_1
    (r"(\\(?:sin|cos|tan))\s*\^\s*\{\s*-1\s*\}", lambda match: r"\arc" + match[1][1:]),
    (r"(?<![A-Za-z\\])([fgh])\s*\^\s*\{\s*-1\s*\}\s*\(", r"\1_{-1}("),
    (r"(?<=[A-Za-z])'+", lambda match: "_{" + "prime" * len(match[0]) + "}"),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"\\\{\s*[A-Za-z](?:\s*\\in[^|:]*)?\s*(?:\\mid|\\vert|[|:])", r"\\{"),  # {x | x > 3} is x > 3
    (r"\|([^|]*)\|", r"\\lvert \1\\rvert "),
    (r'"[^"]*"|\\[A-Za-z]+|(?<![A-Za-z\\_{])(?:[aA]\s+)?([A-Za-z]{2,})(?:\.?\s+(?:[A-Za-z]{2,}|[aAI]\b)|\s*/\s*[A-Za-z]+|[.-][A-Za-z]+)*',
     _bare),
    (r'("[^"]*")\s*\^\s*\{?-?\d\}?', r"\1"), (r'/\s*(?=")', " "),  # cm^2, 18/hour
    (r'(?<=\S)\s*\(\s*("[^"]*")\s*\)', r" \1"),  # 9 (apples)
    (r'(?i)"(dozen|hundred|thousand|million|billion|trillion)s?\b\s*', lambda match: rf'\cdot {_SCALES[match[1].lower()]} "'),
    ('""', ""),
    (r'^((?:\\[a-z]+|[^A-Za-z\\"])*(?:\d(?=\s\s+[msghL])|(?:[\d}]|\\pi)(?=\s\s+m\^)))\s+[A-Za-z](?:\^\{?[23]\}?)?\s*$', r"\1"),  # 5\,m
    (r"^\s*(?:=|\\approx)|[\s.,;:]+$", ""),
]]


def spell(text: str) -> str:
    """The one spelling; currency signs and spacing commands are dropped."""
    text = text.translate(_SYMBOLS)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text.strip()
