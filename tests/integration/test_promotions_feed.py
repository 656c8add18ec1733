"""The Atom feed of a model's promotions."""

from pathlib import Path
from xml.etree import ElementTree as ET

import httpx
import pytest

from nightpress.client import Client
from nightpress.core.settings import Settings
from tests.api import serve
from tests.jobs import add_model, claim, submit, succeeded

ATOM = {"a": "http://www.w3.org/2005/Atom"}


@pytest.mark.slow
def test_the_feed_of_a_models_promotions(tmp_path: Path, sqlite_url: str) -> None:
    settings = Settings(
        _env_file=None,
        data_dir=tmp_path,
        database_url=sqlite_url,
        broker_url="redis://127.0.0.1:1/0",
        public_url="https://nights.example.com",
    )
    with serve(settings) as api, api.client() as http:
        store = api.services.resources.store
        add_model(api.services.resources.engine)
        path = "/v1/models/tiny/promotions.atom"
        assert http.get(path).status_code == 404
        jobs = []
        for name in ("int8", "<int4> & more"):
            recipe = {"name": name, "passes": [{"pass": "magnitude"}], "exports": ["safetensors"]}
            jobs.append(submit(store, recipe=recipe))
            lease = claim(store).lease
            assert store.attempts.finish(lease, succeeded(lease))

        answer = http.get(path)
        assert answer.headers["content-type"] == "application/atom+xml"
        feed = ET.fromstring(answer.content)
        assert feed.tag == "{http://www.w3.org/2005/Atom}feed"
        assert feed.findtext("a:title", namespaces=ATOM) == "Results of tiny"
        assert feed.findtext("a:id", namespaces=ATOM) == "urn:nightpress:model:tiny"
        entries = feed.findall("a:entry", ATOM)
        assert [entry.findtext("a:title", namespaces=ATOM) for entry in entries] == [
            "tiny: <int4> & more",
            "tiny: int8",
        ]
        links = [entry.find("a:link", ATOM) for entry in entries]
        wanted = [f"https://nights.example.com/#/jobs/{job_id}" for job_id in reversed(jobs)]
        assert [link.get("href") for link in links if link is not None] == wanted
        assert feed.findtext("a:updated", namespaces=ATOM) == entries[0].findtext("a:updated", namespaces=ATOM)
        assert len({entry.findtext("a:id", namespaces=ATOM) for entry in entries}) == 2

        unchanged = http.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        http.post("/v1/models/tiny/promotions", json={"job_id": jobs[0]}).raise_for_status()
        again = http.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 200
        assert "Promoted by a person" in again.text

        # Feed readers know only basic authentication; other operations don't take it.
        key = api.key(scopes=["models:read"])
        assert httpx.get(f"{api.url}{path}", auth=("reader", key), trust_env=False).text == again.text
        for auth in (("reader", "np_wrong"), ("", "")):
            assert httpx.get(f"{api.url}{path}", auth=auth, trust_env=False).status_code == 401
        assert httpx.get(f"{api.url}/v1/models", auth=("reader", key), trust_env=False).status_code == 401
        assert http.get("/v1/models/tiny/promotions.atom", headers={"Authorization": "Basic %%%"}).status_code == 401
        with api.client(scopes=["jobs:read"]) as without:
            assert without.get(path).status_code == 403
        with api.client(tenant_id="other") as other:
            assert other.get(path).status_code == 404
        with Client(api.url, key) as client:
            assert client.models.feed("tiny") == again.text
