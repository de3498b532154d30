"""Classes, scores and rankings over HTTP, in the shapes that vLLM's, Jina's and Cohere's clients read."""

from __future__ import annotations

import httpx
import pytest

from tests.engine.test_relevance import save
from tests.helpers.patience import patience
from tests.server.live import KEY, serving

DOCUMENTS = ["paris is in france", "a fish", "berlin is in germany"]


def test_a_generative_model_ranks_and_is_no_classifier(http):
    body = {"model": "tiny", "query": "where is paris", "documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}]}
    answers = [http.post(path, json=body).json() for path in ("/rerank", "/v1/rerank", "/v2/rerank")]
    assert all(answer["results"] == answers[0]["results"] for answer in answers)
    results = answers[0]["results"]
    assert sorted(result["index"] for result in results) == [0, 1] and answers[0]["usage"]["total_tokens"] > 0
    assert results[0]["relevance_score"] >= results[1]["relevance_score"]
    assert all(result["document"]["text"] == DOCUMENTS[result["index"]] for result in results)
    few = http.post("/rerank", json=body | {"top_n": 1, "return_documents": False}).json()["results"]
    assert few == [{key: results[0][key] for key in ("index", "relevance_score")}]
    scored = http.post("/v1/score", json={"text_1": body["query"], "text_2": DOCUMENTS[:2]}).json()
    by_index = {result["index"]: result["relevance_score"] for result in results}
    assert [one["score"] for one in scored["data"]] == pytest.approx([by_index[0], by_index[1]], abs=1e-6)
    refused = http.post("/classify", json={"input": "text"})
    assert refused.status_code == 400 and "no classifier" in refused.json()["error"]["message"]


def test_a_classifier_answers(tmp_path):
    save(tmp_path, "Qwen2", 2, id2label={0: "ham", 1: "spam"}, label2id={"ham": 0, "spam": 1})
    with (
        serving(tmp_path, max_model_len=200) as live,
        httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {KEY}"}, timeout=patience(60)) as http,
    ):
        answer = http.post("/classify", json={"input": ["win a prize", "see you at six"]}).json()
        assert answer["object"] == "list" and [one["index"] for one in answer["data"]] == [0, 1]
        for one in answer["data"]:
            assert one["num_classes"] == 2 and sum(one["probs"]) == pytest.approx(1.0)
            assert one["label"] == ("spam" if one["probs"][1] > one["probs"][0] else "ham")
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 400 and "classifier" in refused.json()["error"]["message"]
        assert http.post("/rerank", json={"query": "a", "documents": ["b"]}).status_code == 400
