"""Takes in models and data sets that are fetched from a source, or that are too large to be verified within a request.

A request writes the row; the control process then fetches or verifies the files.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Row, exists, select, tuple_, update

from nightpress.core.database import db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import FileEntry
from nightpress.core.ids import new_id
from nightpress.core.service.claims import Claim
from nightpress.core.service.registry.registry import (
    Registry,
    Taken,
    TakesLonger,
    View,
    check_size,
    described,
    dumped,
)
from nightpress.core.sources.address import BucketAddress, HubAddress, parse_address, resolve_path
from nightpress.core.sources.open import open_source
from nightpress.core.sources.source import Listing, RemoteFile, Source, read_steadily


class FetchingRegistry(Registry[View]):
    """A registry that also fetches. One process at a time takes in a row, under a claim.

    A process that takes over from another continues after the last complete file.
    """

    def fetch(self, tenant_id: str, name: str, source_url: str, revision: str | None = None, **more: Any) -> View:
        """Add a model or data set for the control process to fetch. more: columns. Raises invalid_request, path_not_allowed."""
        address = parse_address(source_url, self.kind, self._settings)
        row_id = new_id(self.id_prefix)
        kind = "s3" if isinstance(address, BucketAddress) else "hub"
        given = {"state": "fetching", "source": kind, "source_url": address.url, "revision": revision, **more}
        with transaction(self._engine) as connection:
            self._insert(connection, row_id, tenant_id, name, **given, **described([]))
        return self.get(tenant_id, row_id)

    def fetched(self, tenant_id: str, name: str, source_url: str, revision: str) -> View | None:
        """The newest row of this name with this revision of a source, if it is ready or being fetched; else None."""
        columns = self.table.c
        same = (columns.name == name, columns.source_url == source_url, columns.revision == revision)
        query = self._select().where(columns.tenant_id == tenant_id, *same, columns.state != "failed")
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(
                query.order_by(columns.created_at.desc(), columns.id.desc()).limit(1)
            ).one_or_none()
        return None if row is None else self._view(row)

    def take_in(self, claim: Claim) -> None:
        """Fetch or verify the row of the claim, to the end. Faults of its files make it `failed`.

        Raises NightpressError with a retryable code, or cancelled if the claim is lost.
        """
        columns = self.table.c
        with transaction(self._engine, read_only=True) as connection:
            query = self._select().where(columns.id == claim.row_id, columns.claim_id == claim.claim_id)
            row = connection.execute(query).one_or_none()
        if row is None:
            return
        claim.total = row.size
        try:
            if row.state == "fetching":
                files, facts = self._fetch(row, claim)
            elif row.source == "path":
                path = resolve_path(row.server_path, self._settings)
                files, facts = self._examine_path(path, claim.note)
            else:
                files, facts = self._verify_upload(row, claim.note)
            ready = self._ready_columns(row.tenant_id, row._asdict(), files, facts)
        except TakesLonger as error:
            self._forget_if_deleted(row)
            raise NightpressError(
                ErrorCode.SOURCE_UNAVAILABLE, f"It must wait: {error}.", hint="It goes on by itself."
            ) from error
        except NightpressError as error:
            self._forget_if_deleted(row)
            if error.kind.retryable or error.code is ErrorCode.CANCELLED:
                raise
            self._fail(row, error)
            return
        if self._advance(row, **ready):
            self._uploads.forget(self._owner(row.id))
        self._forget_if_deleted(row)

    def give_up(self, claim: Claim, error: NightpressError, *, older_than_s: float) -> bool:
        """Fail the row if it is older than `older_than_s` seconds. False: it is younger and may be tried again."""
        columns = self.table.c
        old = (columns.id == claim.row_id, columns.created_at < db_now(-older_than_s))
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(self._select().where(*old, columns.claim_id == claim.claim_id)).one_or_none()
        if row is None:
            return False
        self._fail(row, error)
        return True

    def forget_superseded(self, older_than_s: float, *, limit: int = 100) -> int:
        """Delete fetched rows older than `older_than_s` seconds that a newer, ready row of the same name replaces. Returns their number.

        Rows that a job needs stay.
        """
        table, newer = self.table, self.table.alias("newer")
        is_newer = (
            newer.c.tenant_id == table.c.tenant_id,
            newer.c.name == table.c.name,
            tuple_(newer.c.created_at, newer.c.id) > tuple_(table.c.created_at, table.c.id),
        )
        query = select(table.c.id, table.c.tenant_id).where(
            table.c.source_url.is_not(None),
            table.c.deleted_at.is_(None),
            table.c.state.in_(("ready", "failed")),
            table.c.created_at < db_now(-older_than_s),
            exists().where(*is_newer, newer.c.state == "ready", newer.c.deleted_at.is_(None)),
        )
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(query.order_by(table.c.created_at).limit(limit)).all()
        count = 0
        for row in rows:
            try:
                self.delete(row.tenant_id, row.id)
            except NightpressError as error:
                if error.code not in {ErrorCode.CONFLICT, ErrorCode.NOT_FOUND}:
                    raise
                continue  # a job needs it, or another process was faster
            count += 1
        return count

    def _fetch(self, row: Row[Any], claim: Claim) -> Taken:
        """Fetch every file of a source into the store. After an interruption, complete files are not fetched again."""
        # Parsed again, because the operator may no longer allow the address.
        address = parse_address(row.source_url, self.kind, self._settings)
        if isinstance(address, HubAddress) and row.revision:
            address = replace(address, revision=row.revision)
        owner = self._owner(row.id)
        source = open_source(address, self._settings)
        try:
            listing = source.listing()
            wanted, beside = self._choose(source, listing)
            claim.total = sum(file.size for file in wanted)
            check_size(self.noun, claim.total, self._limit)
            if row.size == 0:
                self._quotas.check_storage(row.tenant_id, claim.total)
            if listing.revision == row.revision:
                have = {entry["path"]: FileEntry.model_validate(entry) for entry in row.files}
            else:
                have = {}
                self._store.delete_prefix(owner.prefix)
            self._note(row, claim, size=claim.total, revision=listing.revision, files=dumped(have.values()))
            for file in wanted:
                if file.path in have:
                    claim.note(file.size)
                    continue
                pieces = claim.counted(read_steadily(source, file, stop=claim.lost.is_set))
                sha256 = self._store.put_pieces(owner.key(file.path), pieces, size=file.size, sha256=file.sha256)
                have[file.path] = FileEntry(path=file.path, size=file.size, sha256=sha256)
                self._note(row, claim, files=dumped(have.values()))
        finally:
            source.close()
        files = tuple(have[file.path] for file in wanted)
        return files, {**self._examine_stored(owner, files), **beside}

    def _note(self, row: Row[Any], claim: Claim, **columns: Any) -> None:
        """Write columns of the row while the claim is held. Raises cancelled if the claim is lost."""
        mine = (self.table.c.id == row.id, self.table.c.claim_id == claim.claim_id, self.table.c.deleted_at.is_(None))
        with transaction(self._engine) as connection:
            if not connection.execute(update(self.table).where(*mine).values(**columns)).rowcount:
                claim.lost.set()
        claim.note(0)

    def _forget_if_deleted(self, row: Row[Any]) -> None:
        """Delete the files of a deleted row again: this process may have stored files after the deletion."""
        gone = select(self.table.c.id).where(self.table.c.id == row.id, self.table.c.deleted_at.is_not(None))
        with transaction(self._engine, read_only=True) as connection:
            deleted = connection.execute(gone).one_or_none() is not None
        if deleted:
            self._uploads.abandon(self._owner(row.id))

    @abstractmethod
    def _choose(self, source: Source, listing: Listing) -> tuple[Sequence[RemoteFile], Mapping[str, Any]]:
        """The files of a source that are to be fetched, and columns about the others."""
