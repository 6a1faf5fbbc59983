"""MMHal-Bench with a judge of our own on the loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from llava_fa import FourierError
from llava_fa.eval import answerers
from llava_fa.eval.answerers import Loaded
from llava_fa.eval.benchmarks import benchmark, judged
from llava_fa.eval.benchmarks.judged import ask, rating
from llava_fa.eval.benchmarks.run import run

OFFICIAL = 'raise SystemExit("never run")\ntemplate = """about {}\nQ {}\nhuman {}\nLMM {}"""\n'


@pytest.mark.parametrize(
    ("review", "number"),
    [
        ("Explanation.\nRating: 4, fair", 4),
        ("rating: 0", 0),
        ("Rating: 3 … Rating: 5", 0),  # several
        ("I would give 5", 0),  # none
        ("Rating: 7", 0),
    ],
)
def test_ratings_are_read_as_officially(review, number):
    assert rating(review) == number


@pytest.fixture
def judge():
    """Rates an answer by its last digit; ``down`` makes it busy that many times."""

    class Judge(BaseHTTPRequestHandler):
        asked, down, status, keys = [], 0, 503, []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Judge.keys.append(self.headers.get("Authorization"))
            if Judge.down:
                Judge.down -= 1
                self.send_response(Judge.status)
                self.end_headers()
                return
            Judge.asked.append(body)
            text = f"Rating: {body['messages'][0]['content'][-1]}"
            content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield Judge
    server.shutdown()
    server.server_close()
    thread.join()


def files(folder):
    folder.mkdir()
    (folder / "images").mkdir()
    rows = []
    for number, kind in enumerate(("attribute", "counting", "attribute")):
        Image.new("RGB", (24, 24), "red").save(folder / "images" / f"{number}.jpg")
        rows.append(
            {
                "question_type": kind, "question_topic": "x", "image_id": str(number), "question": f"what {number}?",
                "image_src": f"https://example.org/some/{number}.jpg", "image_content": ["square", "red"],
                "gt_answer": "red", "model_answer": "",
            }
        )  # fmt: skip
    (folder / "response_template.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def said(monkeypatch):
    answers = {"what 0?": "gives 6", "what 1?": "gives 2", "what 2?": "gives 4"}
    monkeypatch.setattr(answerers, "answer", lambda m, p, pairs, **o: [answers[prompt] for _, prompt in pairs])
    return answers


class Named:
    chat_template = "x"


def test_judged_after_the_answers_and_only_once(judge, said, tmp_path, monkeypatch):
    monkeypatch.setenv(judged.KEY, "secret")
    data, out = files(tmp_path / "data"), tmp_path / "out"
    plain = run(benchmark("mmhal", data), lambda: Loaded(None, Named()), model="m", out=out)
    assert plain["score"] is None
    assert judge.asked == []  # nothing is sent unless a judge is named
    rows = json.loads((out / "submission" / "response.json").read_text())
    assert [row["model_answer"] for row in rows] == ["gives 6", "gives 2", "gives 4"]
    options = {"judge": judge.url, "judge_model": "j", "reviews": str(out / "reviews.jsonl")}
    with pytest.raises(FourierError, match="no such file"):  # the template comes from the official script
        run(benchmark("mmhal", data, **options), None, model="m", out=out)
    (data / "eval_gpt4.py").write_text(OFFICIAL)
    found = [run(benchmark("mmhal", data, **options), None, model="m", out=out) for _ in range(2)]
    assert len(judge.asked) == 3  # the second time reviews are read
    assert judge.asked[0] == {
        "model": "j",
        "temperature": 0,
        "messages": [{"role": "user", "content": "about square, red\nQ what 0?\nhuman red\nLMM gives 6"}],
    }
    assert judge.keys[0] == "Bearer secret"
    assert "secret" not in "".join(path.read_text() for path in out.rglob("*.json*"))
    assert found[0]["score"] == found[1]["score"] == 4.0
    assert found[0]["figures"]["hallucination_rate"] == pytest.approx(1 / 3)
    assert found[0]["tasks"]["attribute"]["score"] == pytest.approx(5 / 6)
    assert found[0]["interval"][0] >= 2


def test_a_busy_judge_is_asked_again_and_a_refusal_is_told(judge, monkeypatch):
    waited = []
    monkeypatch.setattr(judged.time, "sleep", waited.append)
    judge.down = 2
    assert ask(judge.url, "j", "gives 5") == "Rating: 5"
    assert waited == [1.0, 2.0]
    judge.down = 9
    with pytest.raises(FourierError, match="the judge does not answer \\(status 503\\)"):
        ask(judge.url, "j", "x")
    judge.down, judge.status = 1, 401
    with pytest.raises(FourierError, match="the judge refuses \\(status 401\\)"):
        ask(judge.url, "j", "x")
    with pytest.raises(FourierError, match="it is no web address"):
        ask("file:///etc", "j", "x")


def test_a_script_without_the_template(tmp_path):
    data = files(tmp_path / "data")
    for text, message in (("template = 'x {}'", "no template with four places"), ("def", "it is not Python")):
        (data / "eval_gpt4.py").write_text(text)
        with pytest.raises(FourierError, match=message):
            benchmark("mmhal", data, judge="http://x", judge_model="j").read()


def test_reviews_of_a_killed_run_are_gone_on_from(judge, said, tmp_path):
    data, out = files(tmp_path / "data"), tmp_path / "out"
    (data / "eval_gpt4.py").write_bytes(OFFICIAL.encode("utf-8-sig"))
    options = {"judge": judge.url, "judge_model": "j", "reviews": str(out / "reviews.jsonl")}
    first = run(benchmark("mmhal", data, **options), lambda: Loaded(None, Named()), model="m", out=out)
    kept = (out / "reviews.jsonl").read_bytes()
    (out / "reviews.jsonl").write_bytes(kept[:-10])  # killed while it wrote the last
    for _ in range(2):
        again = run(benchmark("mmhal", data, **options), None, model="m", out=out)
        assert again["score"] == first["score"]
        assert (out / "reviews.jsonl").read_bytes() == kept
    assert len(judge.asked) == 4
    (out / "reviews.jsonl").write_text("[]\n")
    with pytest.raises(FourierError, match=r"reviews\.jsonl: a line is no review"):
        run(benchmark("mmhal", data, **options), None, model="m", out=out)
