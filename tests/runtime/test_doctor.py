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


def test_kernels_that_are_not_built_are_absent_not_broken(tmp_path, monkeypatch):
    from elision.kernels.cpu import library

    library._loaded.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(library, "__file__", str(tmp_path / "library.py"))
            findings = {finding.subject: finding for finding in doctor.examine()}
            assert findings["C++ kernels"].state == "absent"
            assert "no C++ compiler" in findings["C++ kernels"].detail
            assert session.kernel_library() is None
            library._loaded.cache_clear()
            (tmp_path / library.NAME).write_bytes(b"no library")
            findings = {finding.subject: finding for finding in doctor.examine()}
            assert findings["C++ kernels"].state == "broken"
            assert session.kernel_library() is None
    finally:
        library._loaded.cache_clear()
