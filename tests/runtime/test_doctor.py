"""elision doctor."""

from __future__ import annotations

import importlib.metadata

from elision.runtime import doctor, session


def test_findings_cover_what_matters():
    findings = {finding.subject: finding for finding in doctor.examine()}
    for subject in (*doctor.NEEDED, "op dialect", "torch.compile backend", "target: torch on the CPU"):
        assert findings[subject].state == "ok", findings[subject]
    assert doctor.healthy(list(findings.values()))


def test_missing_packages(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name in ("onnxruntime", "timm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = {finding.subject: finding for finding in doctor.examine()}
    assert findings["onnxruntime"].state == "broken" and "pip install" in findings["onnxruntime"].advice
    assert findings["timm"].state == "absent"
    assert not doctor.healthy(list(findings.values()))


def test_library_is_looked_for_in_one_place(tmp_path, monkeypatch):
    from elision import kernels

    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    assert session.kernel_library() is None
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / session.LIBRARY).write_bytes(b"")
    assert session.kernel_library() == tmp_path / "lib" / session.LIBRARY
