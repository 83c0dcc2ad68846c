"""S3's two clients, obstore's and boto3's, told the same: what the environment and the profile say, as boto3 reads it.

obstore moves the bytes; boto3 finds the credentials, asks a bucket where it lies, and ends uploads that nobody will
complete. Both get their settings from here alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fapm.errors import UserError
from fapm.storage.answers import CREDENTIALS


@dataclass(frozen=True)
class Settings:
    """Settings that both clients of a bucket are given.

    Attributes:
        endpoint: None for Amazon's own.
        path_style: the bucket's name stands in the path, not in the host's name.
        authorities: a file of certificates to trust beside the system's, of the environment or the profile.
        proxy: on the way to the endpoint.
        unsigned: without credentials.
    """

    endpoint: str | None
    region: str
    path_style: bool
    authorities: str | None
    proxy: str | None
    unsigned: bool


@functools.cache
def session() -> Any:
    """boto3's, with the profile of the environment.

    Raises:
        UserError: boto3 is missing, or there is no such profile.
    """
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise UserError("s3:// needs boto3: pip install 'fapm[s3]'") from None
    try:
        return boto3.Session()
    except BotoCoreError as error:
        raise UserError(f"s3://: {error}") from None


@functools.cache
def settings(bucket: str) -> Settings:
    """The settings for a bucket: environment before profile, and of the bucket's region what it says itself.

    Raises:
        UserError: the environment or the profile cannot be used.
    """
    from botocore.exceptions import BotoCoreError

    known = session()
    said: Mapping[str, Any] = known._session.get_scoped_config().get("s3") or {}
    region = os.environ.get("AWS_REGION") or known.region_name or "us-east-1"
    try:
        found = known.client("s3", region_name=region).meta.endpoint_url
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"s3://{bucket}: {error}") from None
    endpoint = None if ".amazonaws.com" in found else found
    style = said.get("addressing_style", "auto")
    if os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in ("1", "true"):
        style = "virtual"
    authorities = (
        os.environ.get("AWS_CA_BUNDLE")
        or known._session.get_config_variable("ca_bundle")
        or os.environ.get("SSL_CERT_FILE")
        or os.environ.get("REQUESTS_CA_BUNDLE")
    )
    if authorities and not Path(authorities).is_file():
        raise UserError(f"s3://{bucket}: AWS_CA_BUNDLE or SSL_CERT_FILE names {authorities}, which is not there")
    at = urlsplit(found)
    proxies = getproxies()
    proxy = None if proxy_bypass(at.hostname or "") else proxies.get(at.scheme) or proxies.get("all")
    unsigned = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
    first = Settings(
        endpoint, region, style == "path" or (style == "auto" and bool(endpoint)), authorities, proxy, unsigned
    )
    return Settings(**{**first.__dict__, "region": _region_of(bucket, first) or region})


def _region_of(bucket: str, first: Settings) -> str | None:
    """Where a bucket lies, as it says to everybody who asks."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer = _boto3(first, patient=False).head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except (BotoCoreError, ValueError, RecursionError):  # boto3 follows a redirection that leads nowhere without end
        return None  # whoever asks next says what is wrong
    found: str | None = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
    return found


@functools.cache
def boto3_client(bucket: str) -> Any:
    """boto3's client for a bucket."""
    return _boto3(settings(bucket))


def _boto3(of: Settings, patient: bool = True) -> Any:
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        signature_version=UNSIGNED if of.unsigned else None,
        request_checksum_calculation="when_required",  # what other servers than Amazon's know
        response_checksum_validation="when_required",
        retries={"mode": "standard", "max_attempts": 8 if patient else 1},
        connect_timeout=5,
        read_timeout=30 if patient else 5,
        proxies={"http": of.proxy, "https": of.proxy} if of.proxy else None,
        s3={"addressing_style": "path" if of.path_style else "virtual"},
    )
    return session().client("s3", region_name=of.region, endpoint_url=of.endpoint, verify=of.authorities, config=config)


def obstore_options(bucket: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for obstore: options of the store, and of its HTTP client.

    Raises:
        UserError: there are no credentials.
    """
    of = settings(bucket)
    store: dict[str, Any] = {"region": of.region, "virtual_hosted_style_request": not of.path_style}
    if of.endpoint:
        scheme, _, host = of.endpoint.partition("://")
        store["endpoint"] = of.endpoint if of.path_style else f"{scheme}://{bucket}.{host}"
    if of.unsigned:
        store["skip_signature"] = True
    else:
        store["credential_provider"] = _credentials(bucket)
    client: dict[str, Any] = {"proxy_url": of.proxy} if of.proxy else {}
    if of.authorities:
        client["root_certificate"] = Path(of.authorities).read_bytes()
    return store, client


def _credentials(bucket: str) -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider(session(), ttl=timedelta(minutes=5))  # boto3 renews them ten before the end
    except ValueError:
        raise UserError(f"s3://{bucket}: no credentials were found; they come from {CREDENTIALS['s3']}") from None
