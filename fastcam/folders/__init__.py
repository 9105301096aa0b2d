"""Folders of pictures: resumable jobs, their journal and the report page.

In: files, folders, patterns. Out: overlays or heatmaps, `results.jsonl`, `report.html`. Imports `explaining`,
`pictures` and what they import.
"""
