"""Tiny benchmarks in the official layouts, with pictures and questions of the generated world."""

import base64
import io
import json

from llava_fa.world.samples import samples


def held_out(task, count):
    return samples("test", 7, count, (task,))


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def pope(folder, count=6):
    """Six questions a category."""
    for category in ("random", "popular", "adversarial"):
        rows = []
        found = [s for s in held_out("existence", 60) if s.question.kind == category or s.question.answer == "yes"]
        for number, s in enumerate(found[:count], 1):
            name = f"COCO_val2014_{category}_{number:012}.png"
            save(s.image, folder / "val2014" / name)
            rows.append({"question_id": number, "image": name, "text": s.question.text, "label": s.question.answer})
        (folder / f"coco_pope_{category}.json").write_text(lines(rows))


def textvqa(folder, count=5):
    rows = []
    for number, s in enumerate(held_out("reading", count)[:count]):
        save(s.image, folder / "train_images" / f"img{number}.jpg")
        answers = [s.question.answer] * 10
        rows.append(
            {"question_id": 34602 + number, "question": s.question.text, "image_id": f"img{number}", "answers": answers}
        )
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_name": "textvqa", "data": rows}))


def vizwiz(folder, count=5):
    rows = []
    for number, s in enumerate(held_out("unanswerable", count)[:count]):
        name = f"VizWiz_val_{number:08}.jpg"
        save(s.image, folder / "val" / name)
        answers = [{"answer_confidence": "yes", "answer": s.question.answer}] * 10
        kind = "unanswerable" if s.question.answer == "unanswerable" else "other"
        rows.append(
            {"image": name, "question": s.question.text, "answers": answers, "answer_type": kind, "answerable": 1}
        )
    (folder / "val.json").write_text(json.dumps(rows))


def gqa(folder, count=6):
    rows = {}
    for number, s in enumerate(held_out("attributes", count)[:count]):
        save(s.image, folder / "images" / f"n{number}.jpg")
        rows[f"2000{number}"] = {
            "question": s.question.text, "imageId": f"n{number}", "answer": s.question.answer, "isBalanced": True,
            "types": {"structural": "query", "semantic": "attr", "detailed": "x"},
        }  # fmt: skip
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(rows))


def scienceqa(folder, count=4):
    """Every second problem has a picture."""
    problems = {}
    for number, s in enumerate(held_out("attributes", count)[:count]):
        row = {
            "question": s.question.text, "choices": [s.question.answer, "nothing"], "answer": 0, "hint": "look",
            "image": "image.png" if number % 2 else None, "subject": "natural science", "split": "test",
        }  # fmt: skip
        problems[str(number)] = row
        if row["image"]:
            save(s.image, folder / "images" / "test" / str(number) / "image.png")
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": [], "test": list(problems)}))


def mme(folder, count=3):
    """A sub-task of each of the two layouts."""
    by_group = {}
    for s in held_out("paired", 4 * count):
        by_group.setdefault(s.question.group, []).append(s)
    pairs = [pair for pair in by_group.values() if len(pair) == 2]
    for task, picture, text in (("existence", "", ""), ("posters", "images/", "questions_answers_YN/")):
        for number, pair in enumerate(pairs[:count]):
            save(pair[0].image, folder / task / f"{picture}{number:05}.jpg")
            path = folder / task / f"{text}{number:05}.txt"
            path.parent.mkdir(exist_ok=True)
            rows = [f"{s.question.text} Please answer yes or no.\t{s.question.answer.capitalize()}" for s in pair]
            path.write_text("\n".join(rows) + "\n")


def mmbench(folder, count=3, name="mmbench_dev_20230712.tsv"):
    """Without rotations."""
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]
    rows = ["\t".join(columns)]
    for number, s in enumerate(held_out("attributes", count)[:count]):
        png = io.BytesIO()
        s.image.save(png, "PNG")
        image = base64.b64encode(png.getvalue()).decode()
        cells = [number, s.question.text, "", s.question.answer, "nothing", "", "", "A", "color", image, "attribute"]
        rows.append("\t".join(map(str, cells)))
    (folder / name).write_text("\n".join(rows) + "\n")


def mmbench_cn(folder, count=2):
    mmbench(folder, count, "mmbench_dev_cn_20231003.tsv")


WRITERS = {
    "pope": pope, "textvqa": textvqa, "vizwiz": vizwiz, "gqa": gqa, "scienceqa": scienceqa, "mme": mme,
    "mmbench": mmbench, "mmbench-cn": mmbench_cn,
}  # fmt: skip
