"""Every rule of the official scorers, on cases worked by hand."""

import json
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest

from llava_fa import FourierError
from llava_fa.eval.benchmarks import benchmark
from llava_fa.eval.benchmarks.base import Item
from llava_fa.eval.benchmarks.choice import MMBench, ScienceQA, option_of, options_in, rotations, science_answer
from llava_fa.eval.benchmarks.spreadsheet import write_spreadsheet
from llava_fa.eval.benchmarks.vqa import CONTRACTIONS, GQA, TextVQA, VizWiz, clean_answer
from llava_fa.eval.benchmarks.yes_no import MME, POPE, mme_answer, pope_answer


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Yes", "yes"),
        ("  The Red Bus.", "red bus"),
        ("a cat and an apple", "cat and apple"),
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),  # a period before a digit stays
        ("3.", "3"),
        ("e.g. this", "eg this"),
        ("coca-cola", "coca cola"),  # punctuation between letters becomes a space
        ("left - right", "left right"),  # beside a space it goes
        ("left -right", "left right"),
        ("a-b -c", "ab c"),  # one such place in the text decides for all of that mark
        ("stop!", "stop"),
        ("why?", "why"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("Im", "im"),  # the official table has it in capitals, which never matches
        ("somebody'd", "somebodyd"),  # the official table's slip
        ("joe's bar", "joe 's bar"),
        ("new\nline\ttab", "new line tab"),
        ("a.b." * 20, "ab" * 16 + "a.b." * 4),  # no more than 32 periods go, and a last one after 32 stays
        ("$5 @ 10%", "$5 10%"),
        ("a", ""),
    ],
)
def test_vqa_answers_are_cleaned_as_officially(raw, clean):
    assert clean_answer(raw) == clean


def test_contractions_lack_one_apostrophe():
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert CONTRACTIONS["twas"] == "'twas"


def vqa_items(kind, annotated):
    return [
        Item(str(i), "", (), answers, row={"question_id": i, "image": f"{i}.jpg"})
        for i, answers in enumerate(annotated)
    ]


def test_vqa_accuracy_leaves_every_annotator_out(tmp_path):
    annotated = [["two"] * 2 + ["three"] * 8, ["Coca-Cola"] * 4 + ["pepsi"] * 6, ["x"] * 10]
    items = vqa_items(TextVQA, annotated)
    scored = TextVQA(tmp_path).score(items, ["2.", "the coca cola", "y"])
    assert scored.correct == {"0": pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10), "1": 1.0, "2": 0.0}
    assert scored.figures["accuracy"] == pytest.approx((0.6 + 1) / 3)
    assert scored.read["0"] == "2"


def test_vizwiz_without_answers_is_not_scored_but_written(tmp_path):
    items = vqa_items(VizWiz, [None, None])
    bench = VizWiz(tmp_path)
    assert bench.score(items, ["Yes.", "a dog"]).units == []
    (path,) = bench.submission(items, ["Yes.", "a dog"], tmp_path)
    assert json.loads(path.read_text()) == [{"image": "0.jpg", "answer": "yes"}, {"image": "1.jpg", "answer": "dog"}]


def test_gqa_is_exact_after_case_and_last_period(tmp_path):
    said = ["Yes.", "no", "the table", "Table"]
    items = [
        Item("a", "", (), "yes", part="verify"),
        Item("b", "", (), "yes", part="logical"),
        Item("c", "", (), "table", part="query"),  # an article is a mistake here
        Item("d", "", (), "table", part="query"),
    ]
    scored = GQA(tmp_path).score(items, said)
    assert scored.correct == {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0}
    assert scored.figures == {"accuracy": 0.5, "binary": 0.5, "open": 0.5}
    (path,) = GQA(tmp_path).submission(items, said, tmp_path)
    assert json.loads(path.read_text())[0] == {"questionId": "a", "prediction": "yes"}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a cat.", "no"),
        ("Yes. No more.", "yes"),  # only the first sentence counts
        ("NO", "yes"),  # the rule knows No, no and not
        ("nothing", "yes"),
        ("maybe", "yes"),
    ],
)
def test_pope_reads_as_officially(text, read):
    assert pope_answer(text) == read


def test_pope_by_hand(tmp_path):
    def item(category, number, label):
        return Item(f"{category}/{number}", "", (), label, part=category, unit=f"p{number // 2}.jpg", row={"text": "q"})

    items = [item("random", i, label) for i, label in enumerate(("yes", "yes", "no", "no"))]
    items += [item("adversarial", i, label) for i, label in enumerate(("yes", "no"))]
    # random: 1 hit, 1 miss, 1 false alarm, 1 rightly absent; adversarial: 1 hit, 1 false alarm
    answers = ["Yes", "No", "Yes", "No", "Yes", "Yes"]
    bench = POPE(tmp_path)
    scored = bench.score(items, answers)
    assert list(scored.parts) == ["random", "adversarial"]
    assert scored.parts["random"] | {"metric": "", "interval": ""} == {
        "score": 0.5, "metric": "", "interval": "", "questions": 4,
        "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "yes": 0.5,
    }  # fmt: skip
    assert scored.parts["adversarial"]["score"] == pytest.approx(2 / 3)
    assert scored.parts["adversarial"]["yes"] == 1.0
    assert scored.units == ["p0.jpg", "p1.jpg"]
    assert bench.headline(scored.statistics.sum(0)) == pytest.approx((0.5 + 2 / 3) / 2)
    assert scored.figures["f1"] == pytest.approx((0.5 + 2 / 3) / 2)
    written = bench.submission(items, answers, tmp_path)
    assert [path.name for path in written] == ["coco_pope_random_answers.json", "coco_pope_adversarial_answers.json"]
    assert [json.loads(line) for line in written[1].read_text().splitlines()] == [
        {"question": "q", "answer": "Yes"}
    ] * 2


@pytest.mark.parametrize(
    ("text", "read"),
    [("Yes", "yes"), ("no.", "no"), ("Yes, it is", "yes"), ("Not", "no"), ("I say no", "other"), ("It is", "other")],
)
def test_mme_reads_the_first_four_characters(text, read):
    assert mme_answer(text) == read


def test_mme_by_hand(tmp_path):
    from pathlib import Path

    def pair(task, name):
        for number, label in enumerate(("Yes", "No")):
            row = {"question": f"q{number} Please answer yes or no.", "label": label}
            unit = f"{task}/{name}"
            yield Item(f"{unit}/{number}", "", (Path(name),), label.lower(), part=task, unit=unit, row=row)

    items = [*pair("existence", "a.jpg"), *pair("existence", "b.jpg"), *pair("code_reasoning", "c.png")]
    answers = ["Yes", "No", "Yes", "Yes\nindeed", "hm", "No"]
    bench = MME(tmp_path)
    scored = bench.score(items, answers)
    assert scored.parts["existence"]["accuracy"] == 0.75
    assert scored.parts["existence"]["accuracy_plus"] == 0.5
    assert scored.parts["existence"]["points"] == 125.0
    assert scored.parts["code_reasoning"]["points"] == 50.0
    assert scored.figures == {"perception": 125.0, "cognition": 50.0, "other": pytest.approx(1 / 6)}
    assert bench.headline(scored.statistics.sum(0)) == 175.0
    first = bench.submission(items, answers, tmp_path)[0]
    assert first.name == "existence.txt"
    assert first.read_text().splitlines()[3] == "b.jpg\tq1 Please answer yes or no.\tNo\tYes indeed"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B ", "B"),
        ("B. 5 cm", "B"),
        ("The answer is C.", "C"),
        ("The answer is C, since it is blue", "C"),  # any sign may follow the letter
        ("The answer is C", None),  # but one must
        ("The answer is F.", None),
        ("The answer is C. No, The answer is D.", None),
        ("B 5 cm", None),
        ("b", None),
        ("F", None),
        ("", None),
    ],
)
def test_scienceqa_reads_as_llava(text, letter):
    assert science_answer(text) == letter


def test_scienceqa_refuses_an_option_that_is_not_there(tmp_path):
    items = [Item("7", "", (), "A", row={"choices": 2}), Item("9", "", (), "B", row={"choices": 2})]
    scored = ScienceQA(tmp_path).score(items, ["D", "B"])
    assert scored.figures == {"accuracy": 0.5, "unreadable": 0.5}
    (path,) = ScienceQA(tmp_path).submission(items, ["D", "B"], tmp_path)
    assert json.loads(path.read_text())["results"] == {"7": -1, "9": 1}


OPTIONS = {"A": "red", "B": "dark blue", "C": "green", "D": "a circle"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. dark blue", "B"),
        ("**B**", "B"),
        ("Answer: C", "C"),
        ("A", "A"),
        (
            "A red thing there",
            None,
        ),  # an A among more than three words may be an article; three options are too many below
        ("A or B", None),  # two letters
        ("it is dark blue", "B"),  # one option's text
        ("Dark Blue", "B"),
        ("red and green", None),
        ("b", None),  # a small letter is no option
        ("B is what I would say to this", None),  # the letter is not among the last four words
        ("green " * 20, None),  # longer than twice all options
        ("Z", "Z"),
        ("Cannot determine the answer", "Z"),
        ("", None),
    ],
)
def test_mmbench_reads_options_without_a_judge(text, letter):
    options = {**OPTIONS, "C": "thing"} if text.startswith("A red thing") else OPTIONS
    assert option_of(text, options) == letter


def test_an_article_is_no_option_but_the_text_may_be():
    assert option_of("A thing that is red", OPTIONS) == "A"  # by its text
    assert option_of("A thing that is round", OPTIONS) is None


def table_row(index, answer="A", **more):
    return {
        "index": str(index), "question": "what color?", "hint": "nan",
        "A": "red", "B": "blue", "C": "green", "D": "nan", "answer": answer, "category": "color", "image": "x", **more,
    }  # fmt: skip


def test_rotations_move_every_option_through_every_place():
    turned = rotations(table_row(5, "B"))
    assert [row["index"] for row in turned] == ["5", "1000005", "2000005"]
    assert [row[row["answer"]] for row in turned] == ["blue"] * 3
    assert sorted(row["answer"] for row in turned) == ["A", "B", "C"]
    assert all(row["D"] == "nan" for row in turned)
    assert {row["A"] for row in turned} == {"red", "blue", "green"}


@pytest.mark.parametrize("cell", ["", "nan", "None", "none", "N/A", "NA", "null", " NaN "])
def test_cells_that_the_official_reader_takes_for_empty(cell):
    assert list(options_in(table_row(5, D=cell))) == ["A", "B", "C"]
    assert list(options_in(table_row(5, D="none of them"))) == ["A", "B", "C", "D"]


def test_circular_accuracy_wants_every_rotation(tmp_path):
    items = [
        Item(row["index"], "", (), row["answer"], part="color", unit=str(int(row["index"]) % 1_000_000), row=row)
        for index in (1, 2)
        for row in rotations(table_row(index))
    ]
    answers = [item.expected for item in items]
    answers[1] = "unclear"
    scored = MMBench(tmp_path).score(items, answers)
    assert scored.units == ["1", "2"]
    assert scored.figures == {
        "circular_accuracy": 0.5, "accuracy": pytest.approx(5 / 6), "unreadable": pytest.approx(1 / 6),
    }  # fmt: skip
    color = scored.parts["color"]
    assert (color["score"], color["questions"]) == (0.5, 2)
    assert color["interval"][0] < 0.5 < color["interval"][1]
    assert scored.statistics.tolist() == [[0, 1], [1, 1]]


def test_a_table_with_rotations_is_used_as_it_is(tmp_path):
    rows = [table_row(3), {**table_row(1000003, "C"), "image": "3"}, table_row(4)]
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (tmp_path / "MMBench_DEV_EN.tsv").write_text("\n".join(lines))
    items = benchmark("mmbench", tmp_path).read()
    assert [(item.id, item.unit, item.pictures) for item in items] == [
        ("3", "3", ("x",)),
        ("1000003", "3", ("x",)),
        ("4", "4", ("x",)),
    ]
    assert items[0].prompt.splitlines()[:4] == ["what color?", "A. red", "B. blue", "C. green"]
    (tmp_path / "mmbench_dev_cn_20231003.tsv").write_text("\n".join([*lines[:2], lines[3]]))
    chinese = benchmark("mmbench-cn", tmp_path).read()
    assert len(chinese) == 6
    assert chinese[0].prompt.endswith("请直接回答选项字母。")
    (tmp_path / "MMBench_DEV_EN_V11.tsv").write_text("index\n")
    with pytest.raises(FourierError, match="2 files fit"):
        benchmark("mmbench", tmp_path).read()


def test_spreadsheet_holds_text_and_numbers(tmp_path):
    path = write_spreadsheet(tmp_path / "x.xlsx", ["index", "prediction"], [[7, "a < b & \x00\n c"], [8, "选"]])
    with zipfile.ZipFile(path) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
        names = archive.namelist()
    texts = [[cell.find(".//{*}v" if cell.get("t") is None else ".//{*}t").text for cell in row] for row in sheet[0]]
    assert texts == [["index", "prediction"], ["7", "a < b & \n c"], ["8", "选"]]
    assert names[0] == "[Content_Types].xml"


def test_headlines_take_any_leading_axes(tmp_path):
    for kind, k in ((POPE, 12), (MME, 42)):
        sums = np.arange(2 * k, dtype=float).reshape(2, k)
        assert kind(tmp_path).headline(sums).shape == (2,)
