"""Listings of what a dead process left of an upload."""

from __future__ import annotations

from typing import Any

from ktrain.tier.leftovers import Leftovers, PartPlan, find_leftovers


def test_find_leftovers_reads_all_pages_and_ends_where_a_store_turns_in_circles() -> None:
    parts = [PartPlan(k, (k - 1) * 10, k * 10, {"ChecksumCRC64NVME": str(k)}) for k in range(1, 4)]
    said = [{"PartNumber": k, "Size": 10, "ChecksumCRC64NVME": str(k), "ETag": f"tag-{k}"} for k in range(1, 4)]

    def ask(method: str, **fields: Any) -> dict[str, Any]:
        if method == "list_multipart_uploads":
            return {"Uploads": [{"Key": "a", "UploadId": "1"}, {"Key": "ab", "UploadId": "2"}]}
        assert fields["UploadId"] == "1"
        at = fields["PartNumberMarker"]
        return {"Parts": said[at : at + 1], "IsTruncated": True, "NextPartNumberMarker": min(at + 1, 3)}

    found = find_leftovers(ask, "bucket", "a", parts)
    assert found == Leftovers(("1",), "1", {1: "tag-1", 2: "tag-2", 3: "tag-3"})
