"""Pushes to a server of the tests' own, through the hub's real client."""

import json
import logging
import shlex

import huggingface_hub
import pytest
from hub_server import TOKEN, HubServer, Repo, hub_server
from many_processes import free_port
from tiny_runs import instruct_folder, preference_rows, run_config, write_rows

from lora_dpo_jax.huggingface.folders import export_folder
from lora_dpo_jax.huggingface.hub import HubConfig, check_hub, push_exports
from lora_dpo_jax.main.train import main

pytestmark = pytest.mark.usefixtures("two_devices")

ADAPTER = {"README.md": "---\nlibrary_name: peft\n---\n", "adapter_config.json": "{}"}
MERGED = {"config.json": "{}", "additional_chat_templates/tool.jinja": "{{ 1 }}"}


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    """Both exports of a run, with what else may lie in their folders."""
    for name, files, weights in (("adapter", ADAPTER, "adapter_model"), ("merged", MERGED, "model")):
        with export_folder(tmp_path / name) as folder:
            for file, text in {**files, f"{weights}.safetensors": f"weights of {name}"}.items():
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text(text)
        (tmp_path / name / "step-2").mkdir()
        (tmp_path / name / "step-2" / "config.json").write_text("{}")
        (tmp_path / name / ".notes").write_text("mine")
    return {"peft_save_path": str(tmp_path / "adapter"), "merged_hf_save_path": str(tmp_path / "merged")}


BOTH = HubConfig(adapter="me/adapter", merged="me/merged")


def test_both_exports_are_pushed_and_nothing_else_in_their_folders(hub, paths):
    check_hub(BOTH, "org/base")
    urls = push_exports(BOTH, paths)
    assert {name: url.rpartition("/commit/")[0] for name, url in urls.items()} == {
        "adapter": f"{hub.url}/me/adapter",
        "merged": f"{hub.url}/me/merged",
    }
    files = hub.repos["me/adapter"].branches["main"]
    assert {path: content.decode() for path, content in files.items()} == {
        **ADAPTER,
        "adapter_model.safetensors": "weights of adapter",
    }
    assert set(hub.repos["me/merged"].branches["main"]) == {*MERGED, "model.safetensors"}
    assert hub.repos["me/adapter"].private and hub.repos["me/merged"].private


def test_a_second_push_of_the_same_files_changes_nothing(hub, paths):
    push_exports(BOTH, paths)
    before = dict(hub.repos["me/merged"].branches["main"])
    assert set(push_exports(BOTH, paths)) == {"adapter", "merged"}
    assert (hub.pushes("me/adapter"), hub.pushes("me/merged")) == (1, 1)
    assert hub.repos["me/merged"].branches["main"] == before


def test_weights_of_a_former_push_that_would_be_loaded_instead_are_removed_and_other_files_stay(hub, paths):
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "mine.gguf": b"mine"}
    hub.repos["me/merged"] = Repo(private=True, branches={"main": dict(old)})
    push_exports(HubConfig(merged="me/merged"), paths)
    assert set(hub.repos["me/merged"].branches["main"]) == {*MERGED, "model.safetensors", "mine.gguf"}


def test_a_branch_is_made_and_the_message_is_that_of_the_settings(hub, paths):
    config = HubConfig(adapter="me/adapter", revision="beta/0.1", commit_message="Mine", private=False)
    push_exports(config, paths)
    repo = hub.repos["me/adapter"]
    assert not repo.private and repo.branches["main"] == {}
    assert [(commit["branch"], commit["summary"]) for commit in repo.commits] == [("beta/0.1", "Mine")]


def test_an_export_in_a_bucket_is_pushed(hub, paths):
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(paths["peft_save_path"] + "/", "/bucket/adapter", recursive=True)
    push_exports(HubConfig(adapter="me/adapter"), {"peft_save_path": "memory://bucket/adapter"})
    assert set(hub.repos["me/adapter"].branches["main"]) == {*ADAPTER, "adapter_model.safetensors"}


def refuse_token(hub: HubServer, monkeypatch) -> HubConfig:
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1])
    return BOTH


def forget_token(hub: HubServer, monkeypatch) -> HubConfig:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    return BOTH


def forbid_the_network(hub: HubServer, monkeypatch) -> HubConfig:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return BOTH


def name_the_namespace_of_others(hub: HubServer, monkeypatch) -> HubConfig:
    return HubConfig(adapter="others/adapter")


def name_a_repository_that_only_reads(hub: HubServer, monkeypatch) -> HubConfig:
    hub.repos["me/adapter"] = Repo(private=True, is_writable=False)
    return BOTH


def name_a_public_repository(hub: HubServer, monkeypatch) -> HubConfig:
    hub.repos["me/adapter"] = Repo(private=False)
    return BOTH


ERRORS = {
    refuse_token: "nothing can be pushed there: 401, the token is not valid: run `hf auth login`, or set HF_TOKEN",
    forget_token: "needs a token of the hub: run `hf auth login`, or set HF_TOKEN",
    forbid_the_network: "HF_HUB_OFFLINE=1 forbids it",
    name_the_namespace_of_others: "403, the token may not write there: .*You don't have the rights",
    name_a_repository_that_only_reads: "403, the token may not write there: .*no write access",
    name_a_public_repository: "it is public, and hub.private is true: make it private",
}


@pytest.mark.parametrize("do", ERRORS)
def test_what_cannot_be_pushed_is_an_error_before_the_work(hub, monkeypatch, do):
    with pytest.raises(OSError, match=rf"^hub\.adapter=\w+/adapter.*{ERRORS[do]}") as caught:
        check_hub(do(hub, monkeypatch), "org/base")
    assert TOKEN[:-1] not in str(caught.value)


def test_a_hub_that_is_out_of_reach_or_overloaded_is_a_warning_before_the_work(hub, monkeypatch, caplog):
    hub.fail("/api/repos/create", 503)
    monkeypatch.setattr(logging.getLogger("lora_dpo_jax"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="lora_dpo_jax"):
        check_hub(HubConfig(adapter="me/adapter"), "org/base")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
        check_hub(HubConfig(adapter="me/adapter"), "org/base")
    overloaded, gone = [record.getMessage() for record in caplog.records if record.name == "lora_dpo_jax"]
    assert "hub.adapter=me/adapter: 503, the hub failed" in overloaded
    assert "hub.adapter=me/adapter: the hub is out of reach (ConnectError: " in gone
    assert gone.endswith("The run begins; it tries again at its end")


def test_a_failure_that_passes_costs_a_second_try(hub, paths):
    hub.fail("/commit/", 500, times=2)
    assert set(push_exports(BOTH, paths)) == {"adapter", "merged"}
    assert (hub.pushes("me/adapter"), hub.pushes("me/merged")) == (1, 1)


@pytest.mark.parametrize(
    "part, status, reason",
    [
        ("/commit/", 500, "500, the hub failed"),
        ("/lfs/", 500, "500, the hub failed"),
        ("/preupload/", 403, "403, the token may not write there"),
        ("/info/lfs", 413, "413, a file is too large for it"),
        ("me/adapter/commit", 402, "402, the account has no storage left"),
    ],
)
def test_a_push_that_fails_leaves_a_line_with_the_command_and_the_other_export_is_pushed(
    hub, paths, caplog, part, status, reason
):
    hub.fail(part, status)
    config = HubConfig(adapter="me/adapter", revision="b")
    with caplog.at_level(logging.WARNING, logger="lora_dpo_jax"):
        assert push_exports(config, paths) == {}
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lora_dpo_jax"]
    place = paths["peft_save_path"]
    assert line.startswith(f"hub.adapter=me/adapter: the push failed, and the export at {place} is whole. {reason}")
    assert "\n" not in line and TOKEN not in line
    hub.failures.clear()
    assert set(push_exports(BOTH, paths)) == {"adapter", "merged"}


def test_the_command_in_the_line_pushes_the_export(hub, paths, caplog, monkeypatch, capsys):
    hub.fail("/commit/", 403)
    with caplog.at_level(logging.WARNING, logger="lora_dpo_jax"):
        push_exports(HubConfig(adapter="me/adapter", revision="mine", commit_message="a b"), paths)
    hub.failures.clear()
    command = shlex.split(caplog.records[-1].getMessage().rpartition(" run: ")[2])
    from huggingface_hub.cli.hf import main

    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (None, 0), capsys.readouterr()
    files = set(hub.repos["me/adapter"].branches["mine"])
    assert {*ADAPTER, "adapter_model.safetensors"} <= files <= {*ADAPTER, "adapter_model.safetensors", ".notes"}
    assert hub.repos["me/adapter"].commits[-1]["summary"] == "a b"


def test_an_interrupted_push_leaves_the_line_too(hub, paths, caplog, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupt)
    with caplog.at_level(logging.WARNING, logger="lora_dpo_jax"), pytest.raises(KeyboardInterrupt):
        push_exports(BOTH, paths)
    assert "it was interrupted. To push it by hand, run: hf upload me/adapter" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"adapter": "adapter"}, "hub.adapter='adapter' must be name/repo"),
        ({"merged": "a/b/c"}, "hub.merged='a/b/c' must be name/repo"),
        ({"adapter": "me/--x"}, "hub.adapter='me/--x' must be name/repo"),
        ({"adapter": "me/x", "merged": "me/x"}, "hub.adapter and hub.merged are both me/x; they must differ"),
    ],
)
def test_a_repository_that_cannot_be_is_named_before_anything(settings, message):
    with pytest.raises(ValueError, match=message):
        HubConfig(**settings)


@pytest.mark.parametrize("name, path", [("adapter", "peft_save_path"), ("merged", "merged_hf_save_path")])
def test_a_push_without_its_export_names_both_settings(name, path):
    config = HubConfig(**{name: "me/x"})
    with pytest.raises(ValueError, match=rf"hub\.{name}=me/x pushes the export at {path}, which is null: set {path} "):
        config.check_exports({"gguf_save_path": "out"})


def test_a_base_that_others_do_not_have_is_a_warning(hub, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lora_dpo_jax"):
        check_hub(BOTH, "org/base")
        check_hub(HubConfig(merged="me/merged"), str(tmp_path))
        assert not caplog.text
        check_hub(BOTH, str(tmp_path))
    assert f"initialize_from_hf={tmp_path} is a folder of this machine" in caplog.text


def test_only_the_first_process_of_a_run_asks_the_hub(hub, paths, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    check_hub(BOTH, "org/base")
    assert push_exports(BOTH, paths) == {} and hub.requests == []


def test_nothing_is_asked_of_the_hub_if_nothing_is_set(hub):
    check_hub(HubConfig(), "org/base")
    assert push_exports(HubConfig(), {}) == {} and hub.requests == []


def test_a_run_whose_push_fails_ends_with_its_exports_and_pushes_when_it_is_started_again(
    hub, tmp_path, caplog, capsys
):
    base = tmp_path / "base"
    base.mkdir()
    for file in instruct_folder().iterdir():
        (base / file.name).symlink_to(file)
    (base / "README.md").write_text("---\nlicense: mit\n---\nThe base.\n")
    config = run_config(
        tmp_path,
        write_rows(tmp_path / "rows.jsonl", preference_rows(12)),
        initialize_from_hf=str(base),
        validation_split_fraction=0.25,
        peft_save_path=str(tmp_path / "adapter"),
        merged_hf_save_path=str(tmp_path / "merged"),
        hub={"adapter": "me/adapter", "merged": "me/merged"},
    )
    hub.fail("/commit/", 403)
    with caplog.at_level(logging.WARNING, logger="lora_dpo_jax"):
        main(config)
    failures = [record.getMessage() for record in caplog.records if "the push failed" in record.getMessage()]
    assert len(failures) == 2 and all("run: hf upload me/" in line for line in failures)
    assert (tmp_path / "adapter" / "adapter_config.json").exists() and (tmp_path / "merged" / "config.json").exists()
    assert hub.pushes("me/adapter") == hub.pushes("me/merged") == 0

    hub.failures.clear()
    cards = [(tmp_path / name / "README.md").read_bytes() for name in ("adapter", "merged")]
    main(config)
    assert f"hub.adapter   {hub.url}/me/adapter/commit/" in capsys.readouterr().out
    assert hub.pushes("me/adapter") == hub.pushes("me/merged") == 1
    assert cards == [hub.repos[f"me/{name}"].branches["main"]["README.md"] for name in ("adapter", "merged")]

    adapter, merged = (hub.repos[f"me/{name}"].branches["main"] for name in ("adapter", "merged"))
    assert merged["BASE_MODEL_README.md"] == (base / "README.md").read_bytes()
    assert "lora_dpo_export.json" not in adapter and {"tokenizer.json", "adapter_model.safetensors"} < set(adapter)
    for name, files in (("adapter", adapter), ("merged", merged)):
        (tmp_path / "README.md").write_bytes(files["README.md"])
        card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
        assert card.data.license == "mit" and {"dpo", "trl"} < {*card.data.tags}
        assert f'from_pretrained("me/{name}")' in card.text or f'"me/{name}")' in card.text
        assert "- `prefs`: `rows.jsonl`" in card.text and "9 pairs to train on, 3 held out." in card.text
        assert "| metric | after step 0 | after step 2 |" in card.text and "| `dpo_accuracy` |" in card.text
        assert "type: sigmoid" in card.text and str(tmp_path) not in card.text
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == str(base)
