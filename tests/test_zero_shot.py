"""benchmark/zero_shot.py: what it says of runs and of the paper."""

import json

import pytest
from test_curves import load, run

zero_shot = load("zero_shot")


def evaluated(folder, env_id, exp_name, rows):
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"args": {"env_id": env_id, "exp_name": exp_name, "seed": 3}}))
    (folder / "evaluation.csv").write_text("step,split,episodes,mean,std,median,clips\n" + "\n".join(rows) + "\n")
    return folder


def test_runs_stand_beside_the_paper(tmp_path, monkeypatch, capsys):
    """Its Table 1: of ball_in_cup-catch in video_hard, PIE-G 786 +- 47 and SVEA 403 +- 174."""
    rows = ["500500,test,100,961.5,20.25,970,0", "500500,video_hard,100,700.4,80.9,720,99"]
    one = evaluated(tmp_path / "one", "ball_in_cup-catch", "pieg", rows)
    two = evaluated(tmp_path / "two", "cheetah-run", "drqv2", ["7,video_hard,2,12,3,12,100"])
    run(zero_shot, monkeypatch, one, two, "--published", "PIE-G", "SVEA")
    assert capsys.readouterr().out.splitlines() == [
        "| task | look | pieg, seed 3, step 500500 | drqv2, seed 3, step 7 | PIE-G, paper | SVEA, paper |",
        "| --- | --- | --- | --- | --- | --- |",
        "| ball_in_cup-catch | test | 962 ± 20 (100 episodes) |  |  |  |",
        "| ball_in_cup-catch | video_hard | 700 ± 81 (100 episodes, 99 clips) |  | 786 ± 47 | 403 ± 174 |",
        "| cheetah-run | video_hard |  | 12 ± 3 (2 episodes, 100 clips) | 154 ± 17 | 105 ± 37 |",
    ]


def test_all_of_the_papers_table_is_there():
    tasks = ["ball-in-cup-catch", "cartpole-swingup", "cheetah-run", "finger-spin", "walker-stand", "walker-walk"]
    places = {(task, look) for task in tasks for look in ("video_easy", "video_hard")}
    assert {method: set(cells) for method, cells in zero_shot.published().items()} == dict.fromkeys(
        ("DrQ", "DrQ-v2", "SVEA", "TLDA", "PIE-G"), places
    )


def test_wrong_input_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    one = evaluated(tmp_path / "one", "cheetah-run", "pieg", [])
    (one / "evaluation.csv").write_text("step,agent,split\n1,1,test\n")
    for flags, says in (
        ((tmp_path / "nowhere",), "nowhere: not the folder of a run of drqv2_pieg.py that was evaluated"),
        ((one,), "one: not the folder of a run of drqv2_pieg.py"),
        ((one, "--published", "SAC"), "--published SAC: there are DrQ, DrQ-v2, SVEA, TLDA, PIE-G"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            run(zero_shot, monkeypatch, *flags)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1
