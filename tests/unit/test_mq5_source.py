"""CandleCollector.mq5 as text: MetaEditor alone compiles it, and runs on Windows; what can be checked here is checked here."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from schema.timeframes import TIMEFRAMES

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "deploy" / "mt5" / "CandleCollector.mq5"
PAGE = ROOT / "docs" / "connecting-mt5.md"
TEXT = SOURCE.read_bytes().decode("ascii")

# Functions of MQL5 that the EA calls, with how few and how many arguments its documentation gives them.
MQL5 = {
    "AccountInfoString": (1, 1),
    "Alert": (1, 63),
    "ArrayResize": (2, 3),
    "ArraySetAsSeries": (2, 2),
    "ArraySize": (1, 1),
    "CharArrayToString": (1, 4),
    "Comment": (1, 63),
    "CopyRates": (5, 5),
    "DoubleToString": (1, 2),
    "EventKillTimer": (0, 0),
    "EventSetTimer": (1, 1),
    "FileClose": (1, 1),
    "FileDelete": (1, 2),
    "FileFindClose": (1, 1),
    "FileFindFirst": (2, 3),
    "FileFindNext": (2, 2),
    "FileFlush": (1, 1),
    "FileIsEnding": (1, 1),
    "FileIsExist": (1, 2),
    "FileMove": (4, 4),
    "FileOpen": (2, 4),
    "FileReadArray": (2, 4),
    "FileReadString": (1, 2),
    "FileSize": (1, 1),
    "FileWriteArray": (2, 4),
    "FileWriteString": (2, 3),
    "FolderCreate": (1, 2),
    "GetLastError": (0, 0),
    "GetTickCount64": (0, 0),
    "IntegerToString": (1, 3),
    "IsStopped": (0, 0),
    "MQLInfoInteger": (1, 1),
    "MathMax": (2, 2),
    "MathMin": (2, 2),
    "MathRound": (1, 1),
    "PeriodSeconds": (0, 1),
    "Print": (1, 63),
    "ResetLastError": (0, 0),
    "SeriesInfoInteger": (3, 4),
    "ShortToString": (1, 1),
    "StringAdd": (2, 2),
    "StringCompare": (2, 3),
    "StringFind": (2, 3),
    "StringFormat": (1, 63),
    "StringGetCharacter": (2, 2),
    "StringLen": (1, 1),
    "StringSplit": (3, 3),
    "StringSubstr": (2, 3),
    "StringToCharArray": (2, 5),
    "StringToInteger": (1, 1),
    "StringToLower": (1, 1),
    "StringToUpper": (1, 1),
    "StringTrimLeft": (1, 1),
    "StringTrimRight": (1, 1),
    "StructToTime": (1, 1),
    "SymbolInfoDouble": (2, 3),
    "SymbolInfoInteger": (2, 3),
    "SymbolName": (2, 2),
    "SymbolSelect": (2, 2),
    "SymbolsTotal": (1, 1),
    "TerminalInfoInteger": (1, 1),
    "TimeGMT": (0, 1),
    "TimeLocal": (0, 1),
    "TimeToString": (1, 2),
    "TimeToStruct": (2, 2),
    "TimeTradeServer": (0, 1),
    "WebRequest": (7, 9),
}
CONSTANTS = {
    *(
        "ACCOUNT_SERVER",
        "CP_UTF8",
        "INVALID_HANDLE",
        "MQL_TESTER",
        "WHOLE_ARRAY",
        "SERIES_SYNCHRONIZED",
        "SYMBOL_DIGITS",
    ),
    *("FILE_BIN", "FILE_READ", "FILE_REWRITE", "FILE_TXT", "FILE_UNICODE", "FILE_WRITE", "SYMBOL_POINT"),
    *("INIT_FAILED", "INIT_PARAMETERS_INCORRECT", "INIT_SUCCEEDED", "TERMINAL_CONNECTED", "TERMINAL_MAXBARS"),
    *(f"PERIOD_{name}" for name in TIMEFRAMES),
}
TYPES = {"bool", "char", "datetime", "double", "int", "long", "string", "uint", "ulong", "ushort", "void"}
BUILT_IN_STRUCTS = {"MqlRates", "MqlDateTime", "ENUM_TIMEFRAMES"}
KEYWORDS = {"const", "continue", "do", "else", "false", "for", "if", "input", "return", "struct", "true", "while"}
MEMBERS = {
    *("time", "open", "high", "low", "close", "tick_volume", "spread", "real_volume"),
    *("year", "mon", "day", "hour", "min", "sec", "day_of_week", "day_of_year"),
}
EVENTS = {"OnInit", "OnDeinit", "OnTimer"}


def code() -> str:
    """The source without preprocessor lines, comments and what stands in quotes."""
    text = re.sub(r"^#.*$", "", TEXT, flags=re.M)
    pattern = r"""//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'"""
    return re.sub(pattern, lambda m: "" if m[0][0] == "/" else '""' if m[0][0] == '"' else "0", text, flags=re.S)


CODE = code()
DEFINED = set(re.findall(r"^\w+ (\w+)\([^;{}]*\)$", CODE, re.M))
STRUCTS = set(re.findall(r"^struct (\w+)", CODE, re.M))
MACROS = set(re.findall(r"^#define (\w+)", TEXT, re.M))
INPUTS = dict(re.findall(r"^input \w+\s+(\w+)\s*=\s*(.*?);", TEXT, re.M))
DECLARED = set(re.findall(rf"\b(?:{'|'.join(TYPES | BUILT_IN_STRUCTS | STRUCTS)})\s+&?(\w+)", CODE))


def calls() -> list[tuple[str, int]]:
    """Every call with its number of arguments."""
    found = []
    for match in re.finditer(r"\b(\w+)\(", CODE):
        depth, commas, at = 1, 0, match.end()
        while depth:
            c = CODE[at]
            depth += (c in "([{") - (c in ")]}")
            commas += c == "," and depth == 1
            at += 1
        empty = not CODE[match.end() : at - 1].strip()
        found.append((match[1], 0 if empty else commas + 1))
    return found


def test_it_is_plain_text_that_metaeditor_reads_as_it_stands() -> None:
    assert "\t" not in TEXT
    assert "\r" not in TEXT
    assert not re.search(r"[ ]+$", TEXT, re.M)
    assert max(map(len, TEXT.splitlines())) <= 200


def test_properties() -> None:
    assert "#property strict" in TEXT
    assert re.search(r'^#property version   "\d+\.\d+"$', TEXT, re.M)
    assert re.search(r'^#property copyright "', TEXT, re.M)
    assert all(len(line) < 512 for line in re.findall(r'^#property description "(.*)"$', TEXT, re.M))


def test_brackets_and_quotes_close() -> None:
    assert '"' not in CODE.replace('""', ""), "a string is not closed on its line"
    stack = []
    for number, line in enumerate(CODE.splitlines(), 1):
        for c in line:
            if c in "([{":
                stack.append(c)
            elif c in ")]}":
                assert stack, f"line {number} closes what nothing opened"
                assert stack.pop() + c in ("()", "[]", "{}"), f"line {number}"
    assert stack == []


def test_every_function_is_mql5s_or_its_own() -> None:
    unknown = {name for name, _ in calls()} - set(MQL5) - DEFINED - {"if", "while", "for", "return"} - TYPES
    assert unknown == set()


def test_mql5s_functions_get_as_many_arguments_as_they_take() -> None:
    wrong = [(name, count) for name, count in calls() if name in MQL5 and not MQL5[name][0] <= count <= MQL5[name][1]]
    assert wrong == []
    assert set(MQL5) - {name for name, _ in calls()} == set(), "no longer used: take it off the list"


def test_own_functions_get_the_arguments_that_they_declare() -> None:
    heads = {m[1]: m[2] for m in re.finditer(r"^\w+ (\w+)\(([^;{}]*)\)$", CODE, re.M)}
    wanted = {name: head.count(",") + 1 if head.strip() else 0 for name, head in heads.items()}
    assert [(name, count) for name, count in calls() if name in wanted and wanted[name] != count] == []
    used = Counter(name for name, _ in calls())
    assert {name for name in DEFINED - EVENTS if used[name] < 2} == set(), "defined and never called"


def test_every_name_is_declared() -> None:
    words = re.findall(r"(?<![\w.])([A-Za-z_]\w*)", CODE)
    known = (
        set(MQL5)
        | CONSTANTS
        | TYPES
        | BUILT_IN_STRUCTS
        | KEYWORDS
        | DEFINED
        | STRUCTS
        | MACROS
        | DECLARED
        | set(INPUTS)
    )
    assert set(words) - known == set()
    assert set(re.findall(r"\.([A-Za-z_]\w*)", CODE)) - MEMBERS - DECLARED == set()


def test_nothing_of_cpp_that_mql5_lacks() -> None:
    for pattern in (
        r"\bauto\b",
        r"\busing\b",
        r"\bstd::",
        r"->",
        r"\bnullptr\b",
        r"\[\]\(",
        r"\btry\b",
        r"\bthrow\b",
        r"\bgoto\b",
    ):
        assert not re.search(pattern, CODE), pattern
    # A local reference (T &x = y) is C++; in MQL5 references are parameters only.
    assert not re.search(r"^\s*(?:const\s+)?\w+\s*&\s*\w+\s*=", CODE, re.M)
    # Adjacent literals are not joined.
    assert not re.search(r'""\s+""', CODE)


def test_a_value_leaves_every_function_that_gives_one() -> None:
    for match in re.finditer(r"^(\w+) (\w+)\([^;{}]*\)\n  \{\n(.*?)^  \}$", CODE, re.M | re.S):
        last = match[3].rstrip().rstrip(";").rpartition(";")[2].strip().strip("}").strip()
        assert match[1] == "void" or last.startswith("return("), match[2]


@pytest.mark.parametrize("name", INPUTS)
def test_the_page_explains_every_input_with_its_default(name: str) -> None:
    default = INPUTS[name].strip('"') or "empty"
    row = re.search(rf"^\| `{name}` \| `?(.*?)`? \| ", PAGE.read_text(), re.M)
    assert row, f"{name} has no row in {PAGE.name}"
    assert row[1] == default


@pytest.mark.parametrize(
    "word",
    ["4014", "4060", "5200", "5201", "5203", "Allow WebRequest for listed URL", "Strategy Tester", "Wine", "VPS"],
)
def test_the_page_explains_what_goes_wrong(word: str) -> None:
    assert word in PAGE.read_text()


def test_inputs_show_a_sentence_in_the_terminal() -> None:
    assert len(re.findall(r"^input \w+\s+\w+\s*=.*;\s*// \w", TEXT, re.M)) == len(INPUTS)
    assert all(len(name) <= 63 for name in INPUTS)
