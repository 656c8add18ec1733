"""F43: a control process is killed while it delivers. Another goes on where it stopped, and the result arrives once."""

import signal
from pathlib import Path

from sqlalchemy import update

from nightpress.core.database import db_now, transaction
from nightpress.core.service.tables.deliveries import deliveries
from tests.databases import migrated_sqlite
from tests.deliveries import TENANT, World, large_files
from tests.hub import serve_hub
from tests.servers import Valkey
from tests.service import Service, eventually

MIB = 1024**2
REPOSITORY = "models/acme/tiny"


def test_f43_a_delivery_whose_process_is_killed_goes_on_elsewhere_and_arrives_once(
    tmp_path: Path, valkey_server: Valkey
) -> None:
    sql_url = migrated_sqlite(tmp_path / "nightpress.db")
    with serve_hub() as hub:
        hub.writes.chunk_size = MIB
        settings = {"destinations": ["hf://acme"], "hub_endpoint": hub.url, "destination_networks": ["127.0.0.0/8"]}
        service = Service(tmp_path, sql_url, broker_url=valkey_server.url, **settings)
        world = World(service.settings.data_dir, sql_url, **settings)
        world.credentials("hf://acme", token="hf_right")
        files = large_files(6 * MIB)
        world.accept({"onnx": files}, destinations=["hf://acme/tiny"])
        [delivery] = world.deliveries()
        killed = service.start_control()

        def kill(path: str) -> bool:
            if path.startswith("lfs/part") and path.endswith("/4"):
                hub.writes.interrupt = None
                killed.send_signal(signal.SIGKILL)
                return True
            return False

        hub.writes.interrupt = kill
        killed.wait(60)
        assert hub.writes.received == 3 * MIB
        assert hub.writes.commits == []
        with transaction(service.engine) as connection:  # as if a minute had passed
            connection.execute(update(deliveries).values(claim_until=db_now(-1)))
        for _ in range(2):
            service.start_control()
        done = eventually(lambda: (found := world.store.get(TENANT, delivery.id)).finished_at and found, within=60)
        service.close()
        world.close()
    assert (done.state, done.attempts) == ("delivered", 2)
    assert hub.writes.received == 6 * MIB, "what had arrived was sent again"
    [commit] = hub.writes.commits
    assert hub.repositories[REPOSITORY][commit["oid"]]["model.onnx"] == files["model.onnx"]
