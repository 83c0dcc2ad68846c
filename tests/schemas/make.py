"""Make the schemas beside this file again, of newer versions.

    python tests/schemas/make.py kuberay 1.7.0 FOLDER
    python tests/schemas/make.py kubernetes 1.37.0 FOLDER

where FOLDER holds KubeRay's CRDs (`helm-chart/kuberay-operator/crds` of its repository), or the strict JSON schemas of
that Kubernetes (the package kubernetes-validate on PyPI has them). What describes a field in words is left out.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = {
    "CronJob": "batch.v1.CronJob", "ServiceAccount": "core.v1.ServiceAccount", "Role": "rbac.v1.Role",
    "RoleBinding": "rbac.v1.RoleBinding", "PersistentVolumeClaim": "core.v1.PersistentVolumeClaim",
}  # fmt: skip
_WORDS = ("description", "default", "$schema")


def bare(schema: Any) -> Any:
    """The schema without words, which refuses fields that it does not know, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            out[key] = {name: bare(inner) for name, inner in value.items()}
        elif key not in _WORDS and not (key.startswith("x-kubernetes-") and key != "x-kubernetes-int-or-string"):
            out[key] = bare(value)
    if "properties" in out and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    return out


def kuberay(folder: Path) -> dict[str, Any]:
    found = {}
    for name in ("rayjobs", "raycronjobs"):
        crd = yaml.safe_load((folder / f"ray.io_{name}.yaml").read_text())["spec"]
        [schema] = [v["schema"]["openAPIV3Schema"] for v in crd["versions"] if v["name"] == "v1"]
        found[crd["names"]["kind"]] = bare(schema)
    return found


def kubernetes(folder: Path) -> dict[str, Any]:
    everything = json.loads((folder / "_definitions.json").read_text())["$defs"]
    found: dict[str, Any] = {}
    wanted = [f"io.k8s.api.{name}" for name in KUBERNETES.values()]
    while wanted:
        name = wanted.pop()
        if name not in found:
            text = json.dumps(bare(everything[name]))
            wanted += re.findall(r'"[^"]*#/\$defs/([^"]+)"', text)
            found[name] = json.loads(re.sub(r'"[^"]*#/\$defs/', '"#/$defs/', text))
    return found | {kind: {"$ref": f"#/$defs/io.k8s.api.{name}"} for kind, name in KUBERNETES.items()}


if __name__ == "__main__":
    what, version, source = sys.argv[1:]
    made = {"kuberay": kuberay, "kubernetes": kubernetes}[what](Path(source))
    text = json.dumps({"$defs": made}, separators=(",", ":"), sort_keys=True).encode()
    Path(__file__).with_name(f"{what}-{version}.json.gz").write_bytes(gzip.compress(text, mtime=0))
