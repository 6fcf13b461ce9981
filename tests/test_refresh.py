"""What makes a chapter stale, and what a stored output leaves out."""

import nbformat
import refresh


def chapter(*code):
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in code]
    )


def make_package(tmp_path):
    lib, results = tmp_path / "lib", tmp_path / "results"
    lib.mkdir(), results.mkdir()
    (lib / "low.py").write_text("x = 1\n")
    (lib / "high.py").write_text("def f():\n    from .low import x\n    return x\n")
    (lib / "other.py").write_text("from . import low\n")
    (
        (results / "ladder").mkdir(),
        (results / "study").mkdir(),
        (results / "teacher").mkdir(),
    )
    (results / "ladder" / "a.json").write_text("1")
    return lib, results


def test_digest_follows_code_modules_and_results(tmp_path):
    lib, results = make_package(tmp_path)
    plain, reads = (
        chapter("%matplotlib inline\nfrom kdbook.high import f\nf()"),
        chapter("from kdbook import high\nread_records()"),
    )
    digests = lambda: [refresh.digest(nb, lib, results) for nb in (plain, reads)]
    first = digests()
    assert (
        digests() == first
        and refresh.digest(chapter("from kdbook.high import f\nf() "), lib, results)
        != first[0]
    )
    (lib / "other.py").write_text("from . import low  # not reached\n")
    assert digests() == first
    (results / "ladder" / "b.json").write_text("2")
    second = digests()
    assert second[0] == first[0] and second[1] != first[1], (
        "only the chapter that reads results is stale"
    )
    chapters = dict(
        ladder=reads,
        study=chapter("study_path(study, 1)"),
        teacher=chapter('annotate(rows, "minilm-movies")'),
        none=chapter("#| eval: false\nread_records()"),
    )
    for folder in (
        "ladder",
        "study",
        "teacher",
    ):  # a record makes stale who reads its folder, and nobody else
        before = {
            name: refresh.digest(nb, lib, results) for name, nb in chapters.items()
        }
        (results / folder / "c.json").write_text("3")
        assert {
            name
            for name, nb in chapters.items()
            if refresh.digest(nb, lib, results) != before[name]
        } == {folder}
        (results / folder / "c.json").unlink()
    (lib / "low.py").write_text(
        "x = 2\n"
    )  # reached through high.py, from inside a function
    third = digests()
    assert third[0] != second[0] and third[1] != second[1]


def test_a_chapter_follows_the_studies_it_names():
    assert refresh.folders_read(
        'x = study_records(\'noise\')\nresults_dir() / "study" / "cost"'
    ) == ["study/cost", "study/noise"]
    assert refresh.folders_read(
        "study_records('noise'); study_path(name, 0); correct('same-rows', 'hinton')"
    ) == ["ladder", "study"]
    assert refresh.folders_read("study = 1") == []


def test_tidy_drops_bars_and_widget_views():
    output = nbformat.v4.new_output
    nb = chapter("x")
    nb.cells[0].outputs = [
        output(
            "stream",
            name="stderr",
            text="  0%|          | 0/9\r100%|##########| 9/9 [00:01]\n",
        ),
        output(
            "stream",
            name="stdout",
            text="epoch 1\nstep: 50%|#####     | 1/2\nepoch 2\n",
        ),
        output(
            "display_data",
            {refresh.VIEW: {}, "text/plain": "  0%|          | 0/9 [00:00<?]"},
        ),
        output(
            "display_data",
            {refresh.VIEW: {}, "text/plain": "Explore()", "text/html": "<img>"},
        ),
    ]
    kept = refresh.tidy(nb).cells[0].outputs
    assert [out.output_type for out in kept] == ["stream", "display_data"]
    assert kept[0].text == "epoch 1\nepoch 2\n"
    assert set(kept[1].data) == {"text/plain", "text/html"}
