"""Files of prompts: a prompt is any text, and stays text; what is wrong with a file is told by its line."""

import csv
import json
import re
import sys

import pytest

from dist_vsd.sweep.manifest import PlannedRun
from dist_vsd.sweep.prompts import read_prompts

ODD_PROMPTS = [
    "it's a \"duck\"",
    "$(touch x)",
    "`touch x`",
    "a duck; rm -rf x",
    "a duck\nand #SBATCH --wrap=x\non three lines",
    "../../etc/passwd",
    "-rf",
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)> & &lt;",
    "x" * 5000,
    "緑のアヒル",
    "бөдөнө, زرقاء بطة",
    "🦆" * 300,
    "a\u2028duck\u0085here",
    "=HYPERLINK(1)",
    "{{media}}",
    "%s %(x)s ${x} \\n",
    "a\x00duck",
]


def texts(file):
    return [prompt.text for prompt in read_prompts(file)]


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_lines_are_prompts_and_empty_ones_are_skipped(tmp_path):
    file = write(tmp_path, "p.txt", "\ufeffa green duck\n\n   \n  a red car \r\n")
    assert [(p.text, p.source) for p in read_prompts(file)] == [("a green duck", "p.txt, line 1"), ("a red car", "p.txt, line 4")]


def test_a_table_gives_negative_prompts_tags_and_overrides_with_their_types(tmp_path):
    rows = "prompt,score.rank,negative-prompt,tags,camera.distance,deterministic\n"
    rows += 'a duck,8,"ugly, 7","animals, small","[2.5, 3]",true\n,,,,,\n"a, car\nred",,,,,\n'
    duck, car = read_prompts(write(tmp_path, "p.csv", rows))
    assert duck.overrides == {"score.rank": 8, "negative_prompt": "ugly, 7", "camera.distance": [2.5, 3], "deterministic": True}
    assert duck.tags == ("animals", "small")
    assert (car.text, car.overrides, car.tags) == ("a, car\nred", {}, ())


def test_json_lines_give_the_same(tmp_path):
    line = {"prompt": " a duck\nin two lines ", "negative_prompt": "ugly", "tags": ["animals"], "overrides": {"score.rank": 8}}
    (prompt,) = read_prompts(write(tmp_path, "p.jsonl", "\n" + json.dumps(line) + "\n\n"))
    assert (prompt.text, prompt.tags) == ("a duck\nin two lines", ("animals",))
    assert prompt.overrides == {"score.rank": 8, "negative_prompt": "ugly"}


def test_any_prompt_comes_through_every_kind_of_file_as_it_is(tmp_path):
    lines = [prompt for prompt in ODD_PROMPTS if "\n" not in prompt]
    assert texts(write(tmp_path, "p.txt", "\n".join(lines))) == lines
    assert texts(write(tmp_path, "p.jsonl", "\n".join(json.dumps({"prompt": prompt}) for prompt in ODD_PROMPTS))) == ODD_PROMPTS
    in_tables = [prompt for prompt in ODD_PROMPTS if "\0" not in prompt or sys.version_info >= (3, 11)]  # 3.10's csv knows no NUL
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt"], *([prompt] for prompt in in_tables)])
    assert texts(tmp_path / "p.csv") == in_tables


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="from Python 3.11 on a table may hold NUL")
def test_a_table_with_nul_is_refused_with_its_line_where_python_cannot_read_it(tmp_path):
    with pytest.raises(ValueError, match=r"p.csv, line 2: not a row of a table \(line contains NUL\): mend it"):
        read_prompts(write(tmp_path, "p.csv", "prompt\na\0duck\n"))


def test_any_prompt_gives_a_short_safe_run_id_of_its_own():
    ids = [PlannedRun(prompt=prompt).id for prompt in [*ODD_PROMPTS, "x" * 4999, "it's a duck", "its a duck"]]
    assert len(set(ids)) == len(ids)
    for run_id in ids:
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,60}", run_id), run_id


@pytest.mark.parametrize(
    ("name", "text", "fragments"),
    [
        ("p.txt", "\n  \n", ("p.txt holds no prompt", "write some")),
        ("p.csv", "prompt,tags\n", ("p.csv holds no prompt",)),
        ("p.jsonl", "", ("p.jsonl holds no prompt",)),
        ("p.yaml", "a duck", (".txt, .csv or .jsonl", "p.yaml", "rename")),
        ("p.csv", "text\na duck\n", ("p.csv, line 1", "a column named prompt", "'text'")),
        ("p.csv", "prompt,score.rnk\n", ("line 1", "unknown key 'score.rnk'", "did you mean score.rank")),
        ("p.csv", "prompt,seed\n", ("line 1", "seed can't be set", "--seeds")),
        ("p.csv", "prompt,tags,tags\n", ("line 1", "two columns are named tags")),
        ("p.csv", "prompt,tags\na duck,b,c\n", ("line 2", "3 cells", "2 columns", "quotes")),
        ("p.csv", "prompt,tags\n,b\n", ("line 2", "the prompt is empty")),
        ("p.csv", 'prompt\n"a duck\n', ("line", "not a row of a table")),
        ("p.jsonl", '{"prompt": "a duck"}\n{"prompt": }', ("p.jsonl, line 2", "is not JSON")),
        ("p.jsonl", '"a duck"', ("line 1", "must be an object", "a duck")),
        ("p.jsonl", '{"promt": "a duck"}', ("line 1", "unknown key 'promt'", "did you mean prompt")),
        ("p.jsonl", "{}", ("line 1", "prompt must be text, got None")),
        ("p.jsonl", '{"prompt": ["a duck"]}', ("line 1", "prompt must be text")),
        ("p.jsonl", '{"prompt": " "}', ("line 1", "the prompt is empty")),
        ("p.jsonl", '{"prompt": "a duck", "tags": "b"}', ("line 1", "tags must be a list of texts")),
        ("p.jsonl", '{"prompt": "a duck", "overrides": [8]}', ("line 1", "overrides must be an object")),
        ("p.jsonl", '{"prompt": "a duck", "overrides": {"score": {"rank": 8}}}', ("line 1", "score is a group", "as in score.rank")),
        ("p.jsonl", '{"prompt": "a \\ud83d duck"}', ("line 1", "half a character", "ud83d")),
        ("p.jsonl", "[" * 100_000, ("line 1", "is not JSON")),
    ],
)
def test_what_is_wrong_with_a_file_is_told_by_its_line(tmp_path, name, text, fragments):
    with pytest.raises(ValueError, match="p\\.") as refusal:
        read_prompts(write(tmp_path, name, text))
    for fragment in fragments:
        assert fragment in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("a gr\xfcn duck".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt can't be read \(UnicodeDecodeError\): save it as UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match=r"absent.txt can't be read \(FileNotFoundError\): check the path"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="can't be read"):
        read_prompts(tmp_path / ("long" * 100 + ".txt"))
