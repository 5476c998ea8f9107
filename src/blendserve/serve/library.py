"""Files and uploads: what may be stored, by whom, for how long. Bytes are `Blobs`, records are in the `Store`."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from blendserve.serve.blobs import Blobs, BlobWriter
from blendserve.serve.caller import Caller
from blendserve.serve.clock import Clock
from blendserve.serve.failures import ApiError, invalid, not_found
from blendserve.serve.multipart import Form, boundary_of, read_form, safe_filename
from blendserve.serve.records import (
    INPUT_PURPOSE,
    BatchRecord,
    FileRecord,
    UploadPart,
    UploadRecord,
    new_id,
)
from blendserve.serve.settings import Limits
from blendserve.serve.store import Store

MIN_LIFETIME_S, MAX_LIFETIME_S = 3600, 30 * 86400
UPLOAD_LIFETIME_S = 3600
_COPY_BYTES = 1 << 20


class Library:
    """All files of a service."""

    def __init__(self, store: Store, blobs: Blobs, limits: Limits, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._limits = limits
        self._clock = clock
        self._num_receiving: Counter[str] = Counter()
        self._num_receiving_bytes: Counter[str] = Counter()
        self._completing: set[str] = set()

    # Files

    def file(self, caller: Caller, id: str) -> FileRecord:
        """Raises: ApiError for what does not exist, is expired, or belongs to another key."""
        found = self._store.get(FileRecord, id)
        if found is None or found.owner != caller.owner or _is_over(found.expires_at, self._clock()):
            raise not_found("File object", id)
        return found

    async def receive(self, caller: Caller, chunks: AsyncIterator[bytes], content_type: str | None) -> FileRecord:
        """Store the file of a multipart form. Raises: ApiError, CapacityError; nothing is left then."""
        boundary = boundary_of(content_type)
        id = new_id("file")

        def record_of(form: Form, writer: BlobWriter) -> FileRecord:
            if form.filename is None:
                raise invalid("The form has no part called 'file'.", "file", "missing_required_parameter")
            check_purpose(form.fields.get("purpose"))
            now = int(self._clock())
            return FileRecord(
                id=id,
                owner=caller.owner,
                created_at=now,
                filename=form.filename,
                purpose=INPUT_PURPOSE,
                num_bytes=writer.num_bytes,
                num_lines=writer.num_lines,
                sha256=writer.sha256,
                expires_at=now + self._lifetime_of(form.fields),
            )

        with self._receiving(caller) as check_size:
            writer = self._blobs.create(id)
            try:
                form = await read_form(chunks, boundary, "file", writer, check_size(self._limits.max_file_bytes))
                record_of(form, writer)
                await asyncio.to_thread(writer.commit)
            except BaseException:
                writer.abort()
                raise
            record = record_of(form, writer)
            self._store.put(record)
        return record

    def delete(self, caller: Caller, id: str) -> None:
        """Raises: ApiError for a file that a batch still reads."""
        record = self.file(caller, id)
        if self._is_needed(id):
            raise invalid(
                f"File {id} is the input of a batch that has not ended; cancel the batch first.", "id", "file_in_use"
            )
        self.remove(record)

    def remove(self, *records: FileRecord) -> None:
        """Forget files and delete their bytes."""
        self._store.delete(*records)
        for record in records:
            self._blobs.delete(record.id)

    def sweep(self) -> None:
        """Delete what has expired: files that no batch reads, and unfinished uploads with their parts."""
        now = self._clock()
        self.remove(*(record for record in self._store.expired(FileRecord, now) if not self._is_needed(record.id)))
        for upload in self._store.expired(UploadRecord, now):
            if upload.status == "pending" and upload.id not in self._completing:
                self._drop_parts(replace(upload, status="expired"))

    def known_blobs(self) -> set[str]:
        """Names of all blobs that something refers to."""
        uploads = self._store.page(UploadRecord, label="pending")
        parts = {part.id for upload in uploads for part in upload.parts}
        return parts | {record.id for record in self._store.page(FileRecord)}

    def _is_needed(self, id: str) -> bool:
        active = (
            self._store.page(BatchRecord, label=label)
            for label in ("validating", "in_progress", "cancelling", "finalizing")
        )
        return any(batch.input_file_id == id for batches in active for batch in batches)

    def _lifetime_of(self, fields: Mapping[str, str]) -> int:
        anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return self._limits.file_lifetime_s
        return read_lifetime({"anchor": anchor, "seconds": int(seconds) if seconds and seconds.isdecimal() else None})

    # Uploads

    def create_upload(self, caller: Caller, body: Mapping[str, Any]) -> UploadRecord:
        num_bytes, filename = body.get("bytes"), body.get("filename")
        if not isinstance(num_bytes, int) or isinstance(num_bytes, bool) or num_bytes < 1:
            raise invalid("'bytes' must be the size of the file, a whole number from 1 up.", "bytes")
        if num_bytes > self._limits.max_file_bytes:
            raise self._too_large()
        if not isinstance(filename, str) or not filename:
            raise invalid("'filename' is required.", "filename", "missing_required_parameter")
        check_purpose(body.get("purpose"))
        lifetime = body.get("expires_after")
        self._check_room(caller, num_bytes)
        now = int(self._clock())
        record = UploadRecord(
            id=new_id("upload"),
            owner=caller.owner,
            created_at=now,
            filename=safe_filename(filename),
            purpose=INPUT_PURPOSE,
            mime_type=str(body.get("mime_type", ""))[:200],
            num_bytes=num_bytes,
            expires_at=now + UPLOAD_LIFETIME_S,
            file_lifetime_s=None if lifetime is None else read_lifetime(lifetime),
        )
        self._store.put(record)
        return record

    def upload(self, caller: Caller, id: str) -> UploadRecord:
        found = self._store.get(UploadRecord, id)
        if found is None or found.owner != caller.owner:
            raise not_found("Upload object", id)
        return found

    async def add_part(
        self, caller: Caller, id: str, chunks: AsyncIterator[bytes], content_type: str | None
    ) -> dict[str, Any]:
        """Store one part. Raises: ApiError, CapacityError; nothing is left then."""
        boundary = boundary_of(content_type)
        upload = self._pending_upload(caller, id)
        part_id = new_id("part")
        with self._receiving(caller) as check_size:
            writer = self._blobs.create(part_id)
            try:
                form = await read_form(chunks, boundary, "data", writer, check_size(self._limits.max_part_bytes))
                if form.filename is None:
                    raise invalid("The form has no part called 'data'.", "data", "missing_required_parameter")
                await asyncio.to_thread(writer.commit)
                upload = self._pending_upload(caller, id)  # again: other parts came meanwhile
                if sum(part.num_bytes for part in upload.parts) + writer.num_bytes > 2 * upload.num_bytes:
                    raise invalid(f"The parts have far more than the {upload.num_bytes} bytes of the upload.", "data")
            except BaseException:
                writer.abort()
                self._blobs.delete(part_id)
                raise
            part = UploadPart(part_id, writer.num_bytes)
            self._store.put(replace(upload, parts=(*upload.parts, part)))
        return {"id": part_id, "object": "upload.part", "created_at": int(self._clock()), "upload_id": id}

    async def complete_upload(
        self, caller: Caller, id: str, body: Mapping[str, Any]
    ) -> tuple[UploadRecord, FileRecord]:
        """Join parts to a file. Raises: ApiError when they are not the file that was announced."""
        upload = self._pending_upload(caller, id)
        sizes = {part.id: part.num_bytes for part in upload.parts}
        part_ids = body.get("part_ids")
        if not isinstance(part_ids, list) or not part_ids or not all(name in sizes for name in map(str, part_ids)):
            raise invalid("'part_ids' must list parts of this upload, in order.", "part_ids")
        if len(set(part_ids)) < len(part_ids):
            raise invalid("'part_ids' lists a part twice.", "part_ids")
        total = sum(sizes[name] for name in part_ids)
        if total != upload.num_bytes:
            raise invalid(
                f"The parts have {total} bytes, and the upload was announced with {upload.num_bytes}.", "bytes"
            )
        self._completing.add(id)
        try:
            return await self._join(upload, part_ids, body.get("md5"))
        finally:
            self._completing.discard(id)

    def cancel_upload(self, caller: Caller, id: str) -> UploadRecord:
        return self._drop_parts(replace(self._pending_upload(caller, id), status="cancelled"))

    async def _join(self, upload: UploadRecord, part_ids: list[str], md5: object) -> tuple[UploadRecord, FileRecord]:
        file_id = new_id("file")
        writer = self._blobs.create(file_id)
        try:
            found = await asyncio.to_thread(self._copy_parts, part_ids, writer)
            if isinstance(md5, str) and md5.lower() != found:
                raise invalid(f"The file's md5 is {found}, and {md5[:64]} was announced.", "md5", "checksum_mismatch")
            await asyncio.to_thread(writer.commit)
        except BaseException:
            writer.abort()
            raise
        now = int(self._clock())
        file = FileRecord(
            id=file_id,
            owner=upload.owner,
            created_at=now,
            filename=upload.filename,
            purpose=upload.purpose,
            num_bytes=writer.num_bytes,
            num_lines=writer.num_lines,
            sha256=writer.sha256,
            expires_at=now + (upload.file_lifetime_s or self._limits.file_lifetime_s),
        )
        done = replace(upload, status="completed", file_id=file_id, parts=())
        self._store.put(file, done)
        for part in upload.parts:
            self._blobs.delete(part.id)
        return done, file

    def _copy_parts(self, part_ids: list[str], writer: BlobWriter) -> str:
        md5 = hashlib.md5(usedforsecurity=False)
        for part_id in part_ids:
            with self._blobs.open(part_id) as part:
                while data := part.read(_COPY_BYTES):
                    writer.write(data)
                    md5.update(data)
        return md5.hexdigest()

    def _pending_upload(self, caller: Caller, id: str) -> UploadRecord:
        upload = self.upload(caller, id)
        if upload.status != "pending" or upload.expires_at <= self._clock() or id in self._completing:
            state = upload.status if upload.status != "pending" else "expired or being completed"
            raise invalid(f"Upload {id} is {state}; it takes nothing more.", "upload_id")
        return upload

    def _drop_parts(self, upload: UploadRecord) -> UploadRecord:
        parts, dropped = upload.parts, replace(upload, parts=())
        self._store.put(dropped)
        for part in parts:
            self._blobs.delete(part.id)
        return dropped

    # Room

    def check_announced(self, caller: Caller, num_bytes: int | None) -> None:
        """Refuse a body by its Content-Length, before it is read. Raises: ApiError."""
        if num_bytes is not None:
            if num_bytes > self._limits.max_file_bytes + (1 << 20):
                raise self._too_large()
            self._check_room(caller, num_bytes)

    @contextmanager
    def _receiving(self, caller: Caller) -> Iterator[Callable[[int], Callable[[int], None]]]:
        """Count one upload of a caller. Yields: from the most bytes of a file, a check of sizes."""
        owner, key = caller.owner, caller.key
        limit = self._limits.max_uploads if key is None or key.max_uploads is None else key.max_uploads
        if self._num_receiving[owner] >= limit:
            raise ApiError(
                429,
                f"{limit} uploads of this key are under way, which is the limit; wait for one to end.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "5"},
            )
        counted = 0

        def check_size(max_bytes: int) -> Callable[[int], None]:
            def check(num_bytes: int) -> None:
                nonlocal counted
                if num_bytes > max_bytes:
                    raise self._too_large(max_bytes)
                self._check_room(caller, num_bytes - counted)
                self._num_receiving_bytes[owner] += num_bytes - counted
                counted = num_bytes

            return check

        self._num_receiving[owner] += 1
        try:
            yield check_size
        finally:
            self._num_receiving[owner] -= 1
            self._num_receiving_bytes[owner] -= counted

    def _check_room(self, caller: Caller, num_bytes: int) -> None:
        """Raises: ApiError 507 when so many bytes more are too many."""
        key, limits = caller.key, self._limits
        if key is not None and key.max_bytes is not None:
            used = self._store.stored_bytes(key.id) + self._num_receiving_bytes[key.id]
            if used + num_bytes > key.max_bytes:
                raise _no_room(f"this key may store {key.max_bytes} bytes, and {used} are stored")
        if limits.quota_bytes is not None:
            used = self._store.stored_bytes() + self._num_receiving_bytes.total()
            if used + num_bytes > limits.quota_bytes:
                raise _no_room(f"the service may store {limits.quota_bytes} bytes, and {used} are stored")
        if num_bytes + limits.min_free_bytes > self._blobs.free_bytes():
            raise _no_room("the disk of the service is nearly full")

    def _too_large(self, max_bytes: int | None = None) -> ApiError:
        limit = self._limits.max_file_bytes if max_bytes is None else max_bytes
        return ApiError(413, f"At most {limit} bytes are taken at once; split the file.", code="file_too_large")


def _no_room(reason: str) -> ApiError:
    return ApiError(507, f"No room for the file: {reason}. Delete files, or wait until some expire.", code="no_space")


def _is_over(expires_at: int | None, now: float) -> bool:
    return expires_at is not None and expires_at <= now


def check_purpose(purpose: object) -> None:
    """Raises: ApiError."""
    if purpose is None:
        raise invalid("'purpose' is required.", "purpose", "missing_required_parameter")
    if purpose != INPUT_PURPOSE:
        raise invalid(f"purpose is {str(purpose)[:40]!r}; this service takes {INPUT_PURPOSE!r}.", "purpose")


def read_lifetime(value: object, param: str = "expires_after") -> int:
    """Seconds of {"anchor": "created_at", "seconds": N}. Raises: ApiError."""
    found = value if isinstance(value, Mapping) else {}
    seconds = found.get("seconds")
    if found.get("anchor") != "created_at":
        raise invalid(f"{param}.anchor must be 'created_at'.", f"{param}.anchor")
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not MIN_LIFETIME_S <= seconds <= MAX_LIFETIME_S:
        raise invalid(f"{param}.seconds must be from {MIN_LIFETIME_S} to {MAX_LIFETIME_S}.", f"{param}.seconds")
    return seconds
