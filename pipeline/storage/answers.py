"""Answers of stores: which are final, so that asking again is of no use, and which may pass.

One table for all stores. What is not in it is decided by its status; what has none is the network's, and may pass.
"""

from __future__ import annotations

import os
import re
from urllib.request import getproxies, proxy_bypass

from obstore.exceptions import PermissionDeniedError, PreconditionError, UnauthenticatedError

from fapm.errors import PassingError, UserError

_REGION = "the bucket lies in another region than the one that was asked: set AWS_REGION, or ask at its own endpoint"
_STYLE = "the store wants the bucket's name in the host's: addressing_style = virtual under s3 in ~/.aws/config"
FINAL = {
    "NoSuchBucket": "there is no such bucket",
    "ContainerNotFound": "there is no such container",
    "InvalidBucketName": "that is no name of a bucket",
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "SecondLevelDomainForbidden": _STYLE,
    "PathStyleRequestNotAllowed": _STYLE,
    "AccountIsDisabled": "the account is disabled",
    "AccountProblem": "there is a problem with the account, of which the store's console says more",
    "AllAccessDisabled": "the store has disabled all access to it",
    "NotSignedUp": "the account is not signed up for this store",
    "InvalidAccessKeyId": "the store does not know the access key",
    "SignatureDoesNotMatch": "the store does not accept the secret key",
    "ExpiredToken": "the credentials have expired",
    "InvalidToken": "the store does not know the session token",
    "RequestTimeTooSkewed": "this machine's clock differs from the store's by too much: set it right",
    "RequestExpired": "this machine's clock differs from the store's by too much: set it right",
    "QuotaExceeded": "the quota of the account or the bucket is used up",
    "TooManyBuckets": "the account has as many buckets as it may",
    "EntityTooLarge": "it is larger than the store allows",
    "InvalidStorageClass": "the store does not know the storage class",
    "InvalidObjectState": "it is archived; restore it first",
    "NotImplemented": "the store does not know this kind of request",
    "MethodNotAllowed": "the store does not allow this kind of request",
    "KMS.DisabledException": "the key with which it is encrypted is disabled",
}
"""Codes that will be answered again, whatever one does but what is said."""

PASSING = ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "ServerBusy", "OperationAborted",
           "ConditionalRequestConflict", "TooManyRequests", "503", "BandwidthLimitExceeded")  # fmt: skip
"""Codes after which asking again is worth it, whatever their status."""

_PASSING_STATUS = ("408", "425", "429", "500", "502", "503", "504")
_FINAL_STATUS = {
    "301": _REGION,
    "307": _REGION,
    "308": _REGION,
    "501": FINAL["NotImplemented"],
    "505": FINAL["NotImplemented"],
    "507": "the store has no room left",
}

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with a key or token, or the machine's identity",
    "hf": "`hf auth login` or HF_TOKEN; a gated repository wants its conditions accepted, too",
}


def code_of(text: str) -> str:
    """The code in what a store answers; empty where it says none, as to HEAD."""
    found = re.search(r"<Code>([\w.]+)</Code>", text)
    return found[1] if found else ""


def explained(address: str, error: Exception) -> UserError:
    """A sentence for what a store has answered to a request about an address, or that it has not.

    Nothing of the answer is shown but its code and, of one that is not known here, its message: the rest may hold
    signatures.
    """
    text = str(error)
    code, status = code_of(text), _status(text)
    if isinstance(error, FileNotFoundError):
        return UserError(f"{address}: {FINAL[code]}" if code in FINAL else f"there is no {address}")
    if code in FINAL:
        return UserError(f"{address}: {FINAL[code]}")
    if code in PASSING or status in _PASSING_STATUS:
        return _may_pass(address, f"{status} {code}".strip())
    if isinstance(error, PreconditionError):
        return UserError(f"{address} was replaced while it was in use; start again")
    if code and code not in ("AccessDenied", "Forbidden", "AuthenticationFailed", "AuthorizationFailure"):
        return UserError(f"{address}: the store refuses it: {status} {code}{_message(text)}")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in ("401", "403"):
        how = CREDENTIALS[address.partition(":")[0]]
        return UserError(f"{address}: the store denies access ({code or 'it says no more'}); credentials: {how}")
    if status in _FINAL_STATUS:
        return UserError(f"{address}: {_FINAL_STATUS[status]} ({status})")
    if status:
        return UserError(f"{address}: the store refuses it: {status}")
    return of_the_network(address, text)


def of_the_network(address: str, text: str) -> UserError:
    """A sentence for a request that had no answer."""
    if "certificate" in text.lower():
        why = re.search(r"UnknownIssuer|NotValidForName\w*|Expired|NotValidYet|Revoked|BadSignature", text)
        return UserError(
            f"{address}: the certificate of the store is not trusted ({why[0] if why else 'it says no more'}); for one "
            "of your own authority set AWS_CA_BUNDLE or SSL_CERT_FILE to its file"
        )
    if "redirect" in text.lower():
        return UserError(f"{address}: {_REGION}")
    if any(word in text for word in ("builder error", "relative URL without a base", "invalid URI")):
        return UserError(f"{address}: the endpoint that the environment names is no address of a server")
    if not any(word in text for word in ("source", "status", "HTTP")) and "timed out" not in text.lower():
        return UserError(f"{address}: {text.splitlines()[0][:200]}")
    where = re.search(r"(https?)://([^/\s:,)\"]+)", text)
    proxy = _proxy(where[1], where[2]) if where else ""
    if proxy:
        return _may_pass(address, f"by way of the proxy {proxy}, which does not answer, or breaks the connection")
    if "dns error" in text or "resolve" in text:
        return _may_pass(
            address, f"the name {where[2] if where else 'of its server'} is not known to this machine's DNS"
        )
    what = "nothing listens there" if "refused" in text.lower() else "it cannot be reached, or the connection breaks"
    return _may_pass(address, what)


def _may_pass(address: str, why: str) -> PassingError:
    return PassingError(f"{address}: the store does not answer as it should ({why}); run the same command again later")


def _status(text: str) -> str:
    found = re.search(r"status code: (\d{3})", text)
    return found[1] if found else ""


def _message(text: str) -> str:
    """The store's own words."""
    found = re.search(r"<Message>([^<]{1,300})", text)
    return f" ({' '.join(found[1].split())[:200]})" if found and "ignature" not in found[1] else ""


def _proxy(scheme: str, host: str) -> str:
    """The proxy of the environment on the way to a host, without what it may want to know of one."""
    found = getproxies()
    proxy = found.get(scheme) or found.get("all") or ""
    if not proxy or proxy_bypass(host):
        return ""
    name = next((n for n in (f"{scheme}_proxy", "all_proxy") if os.environ.get(n) or os.environ.get(n.upper())), "")
    return re.sub(r"//[^@/]*@", "//", proxy) + (f" ({name.upper()})" if name else "")
