"""A Google Cloud Storage of this machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any
from unittest.mock import patch

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from many_processes import free_port


@contextmanager
def google_storage(bucket: str) -> Iterator[dict[str, str]]:
    """With an empty bucket; gives the environment variables by which gcsfs and TensorStore find it."""
    from gcp_storage_emulator import server  # takes the handlers as they are now

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with patch.object(server, "_decode_raw_data", partial(_decoded, server._decode_raw_data)):
        running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
        running.start()
        try:
            yield {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
        finally:
            running.stop()


def _decoded(plain: Callable, raw_data: bytes | None, request_handler: Any) -> bytes | None:
    r"""The body of a request, with \r\n before the line that ends a multipart one.

    gcsfs writes \n alone there, and the emulator took the last byte of a content for the other half of the line's end.
    """
    data = plain(raw_data, request_handler)
    if data and request_handler.headers.get_content_type() == "multipart/related":
        boundary = data.partition(b"\n")[0]
        if not boundary.endswith(b"\r"):
            last = b"\n" + boundary + b"--"
            return data.removesuffix(last) + b"\r" + last
    return data


# What TensorStore relies on and the emulator lacks: generations, by which it knows whether an object is still the same.
# https://cloud.google.com/storage/docs/request-preconditions


def _generation(storage: Any, bucket: str, name: str) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def _get(request: Any, response: Any, storage: Any, *args: Any, plain: Any = objects.get, **kwargs: Any) -> Any:
    if request.query.get("alt") != ["media"]:
        return plain(request, response, storage, *args, **kwargs)
    generation = _generation(storage, request.params["bucket_name"], request.params["object_id"])
    response["x-goog-generation"] = generation
    if generation != "0" and request.query.get("ifGenerationNotMatch") == [generation]:
        response.status = HTTPStatus.NOT_MODIFIED
        return None
    return plain(request, response, storage, *args, **kwargs)


def _insert(request: Any, response: Any, storage: Any, *args: Any, plain: Any = objects.insert, **kwargs: Any) -> Any:
    if "ifGenerationMatch" in request.query:
        generation = _generation(storage, request.params["bucket_name"], request.query["name"][0])
        if request.query["ifGenerationMatch"] != [generation]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return None
    return plain(request, response, storage, *args, **kwargs)


objects.get, objects.insert = _get, _insert
