"""What the fingerprint says of a processor."""

from __future__ import annotations

from workers.engine.processor import processor, told

LISTING = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R)
stepping\t: 8
flags\t\t: fpu avx2 avx512f avx512_bf16{more} xsaves

processor\t: 1
vendor_id\t: Other
"""


def test_what_decides_about_kernels_tells_processors_apart(tmp_path):
    found = []
    for more in ("", " amx_bf16"):
        path = tmp_path / "cpuinfo"
        path.write_text(LISTING.format(more=more))
        found.append(processor(path))
    assert found[0].endswith("GenuineIntel 6 143 8 avx2 avx512f avx512_bf16")
    assert found[1] == f"{found[0]} amx_bf16"
    assert processor(tmp_path / "none")


def test_what_libraries_were_told_tells_workers_apart():
    plain = {"PATH": "/bin", "OMP_NUM_THREADS": "2"}
    assert told(plain) == "OMP_NUM_THREADS=2"
    narrow = plain | {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
    assert told(narrow) == "MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=2 ONEDNN_MAX_CPU_ISA=AVX2"
