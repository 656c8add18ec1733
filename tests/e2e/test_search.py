"""A search on a real model with a real worker, by the command line: trials, the last measurement, the report, and how to take the winner."""

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nightpress import migrations
from nightpress.client.cli.main import app
from nightpress.core.ids import new_id
from nightpress.core.settings import Settings
from nightpress.worker.control import Control
from tests.api import serve
from tests.service import Service

SPACE = """
recipes:
  - name: rounded
    passes:
      - {pass: weight-only, bits: {choice: [2, 4, 8]}, group_size: 64}
    exports: [compressed-tensors]
  - name: halves
    passes: [{choice: [null, {pass: channels, share: 0.5}]}]
    exports: [safetensors]
calibration: {samples: 4, length: 32}
"""


def test_a_search_on_a_real_model(tmp_path: Path, sqlite_url: str, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch):
    service = Service(tmp_path, sqlite_url, lease_ttl_s=20, tick_s=0.2, model_roots=[bert_tiny.parent])
    migrations.upgrade(sqlite_url)
    slot, supervisor = service.slot(None, memory=4 * 1024**3)
    over = threading.Event()
    with serve(service.settings) as api:
        monkeypatch.setenv("NIGHTPRESS_API_URL", api.url)
        monkeypatch.setenv("NIGHTPRESS_API_KEY", api.key())
        control = Control(api.services.resources, lambda _queue: None)

        def fleet() -> None:
            while not over.wait(0.2):
                control.tick()
                slot.serve()

        thread = threading.Thread(target=fleet)
        thread.start()
        try:
            run = CliRunner().invoke
            space = tmp_path / "space.yaml"
            space.write_text(SPACE)
            ask = ["search", str(bert_tiny), "--gate", "masked_accuracy >= -20%", "--gate", "size <= 90%"]
            ask += ["--space", str(space), "--trials", "6", "--parallel", "1", "--samples", "12", "--length", "32"]
            found = run(app, [*ask, "--wait", "--json"])
        finally:
            over.set()
            thread.join()
            control.close()
        assert found.exit_code == 0, found.output
        print(found.stdout)
    service.close()
