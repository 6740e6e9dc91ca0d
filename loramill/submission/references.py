"""Files and versions that the parameters of a request name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from loramill.errors import InvalidRequest, NotFound
from loramill.registry import datasets
from loramill.types import DatasetRecord


@contextmanager
def named_by(param: str) -> Iterator[None]:
    """Turns "there is no such thing" into an error about the parameter that names it (400; 404 is about the URL)."""
    try:
        yield
    except (NotFound, InvalidRequest) as error:
        raise InvalidRequest(error.message, param=param) from error


def find_file(session: Session, file_id: str, tenant: str, param: str) -> DatasetRecord:
    """The file that `param` names.

    Raises:
        InvalidRequest: the tenant has no such file.
    """
    with named_by(param):
        return datasets.get(session, file_id, tenant)
