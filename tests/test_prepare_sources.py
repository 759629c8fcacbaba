"""What lies in folders and archives, under what names, and what is no clip."""

import errno
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import made_clips as made
import numpy as np
import pytest
from made_clips import numbered, numbers, write_pictures, write_video
from PIL import Image

from mostgan import prepare
from mostgan.config import UserError

ROOT = Path(__file__).parents[1]


def png(image):
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def pictures(folder, n=4):
    """{member name: bytes} of a folder of numbered pictures."""
    return {f"{folder}/{k:03d}.png": png(image) for k, image in enumerate(numbered(n, 16, 16))}


def make_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return path


def make_tar(path, files):
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".txz": "w:xz", ".bz2": "w:bz2"}.get(
        path.suffix, "w"
    )
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def make_archive(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_zip(path, files) if path.suffix == ".zip" else make_tar(path, files)


def everything(folder):
    """All paths under a folder, but what packing may make there."""
    return sorted(
        path for path in folder.rglob("*") if "dst" not in path.relative_to(folder).parts[0]
    )


ARCHIVES = ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.xz"]


# --------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("name", [*ARCHIVES, "A.ZIP"])
def test_archives_are_read_in_place(tmp_path, name):
    write_video(tmp_path / "v.mp4", numbered(8))
    made.write_animation(tmp_path / "g.gif", numbered(5), [40] * 5)
    files = pictures("deep/frames") | {
        name: (tmp_path / name).read_bytes() for name in ("v.mp4", "g.gif")
    }
    files |= {"README.txt": b"a data set", "deep/frames/Thumbs.db": b"x"}
    make_archive(tmp_path / name.lower(), files).rename(tmp_path / name)
    before = everything(tmp_path)
    _, clips = made.pack(tmp_path / name, tmp_path / "dst", 16, fps=25)
    assert clips.names == ["deep/frames", "g.gif", "v.mp4"]
    assert [numbers(clips, k) for k in range(3)] == [list(range(4)), list(range(5)), list(range(8))]
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_lying_in_a_folder_are_read_too(tmp_path, name):
    write_pictures(tmp_path / "src" / "b", numbered(5))
    make_archive(tmp_path / "src" / name, pictures("x/y"))
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert len(clips) == 2 and clips.names[0].endswith("x/y") and clips.names[1] == "b"
    assert numbers(clips, 0) == list(range(4)) and numbers(clips, 1) == list(range(5))


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_names_that_lead_out_of_an_archive_are_named_and_left(tmp_path, name):
    bad = [
        "../../evil",
        "/tmp/evil-absolute",
        "good/../../evil2",
        "C:\\evil3",
        "\\\\server\\evil4",
        "..\\evil5",
    ]
    files = pictures("good")
    for folder in bad:
        files |= {f"{folder}/{k}.png": png(image) for k, image in enumerate(numbered(3, 16, 16))}
    (tmp_path / "in").mkdir()
    make_archive(tmp_path / "in" / name, files)
    before = everything(tmp_path)
    index, clips = made.pack(tmp_path / "in" / name, tmp_path / "dst", 16)
    assert "good" in clips.names and numbers(clips, clips.names.index("good")) == list(range(4))
    assert everything(tmp_path) == before and not Path("/tmp/evil-absolute").exists()
    for clip in set(clips.names) - {"good"}:  # names that are strange but stay inside may be read
        assert ".." not in clip and not clip.startswith(("/", "\\"))
    for part in ("../../evil", "/tmp/evil-absolute", "evil2"):
        assert made.notes_on(index, part), part


def test_archives_of_one_name_in_two_folders_and_of_a_long_name(tmp_path):
    long = "t" * 248 + ".tar.gz"
    for k, name in enumerate(["a/x.tar.gz", "b/x.tar.gz", long]):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        files = {f"./c/{i}.png": png(made.flat([40 + 50 * k])[0]) for i in range(3)}
        make_archive(tmp_path / "src" / name, files)
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert clips.names == ["a/x.tar.gz/c", "b/x.tar.gz/c", long + "/c"]
    assert [made.levels(clips, k)[0] for k in range(3)] == [40, 90, 140]


def test_a_disk_that_is_too_full_to_unpack_is_no_damaged_archive(tmp_path, monkeypatch):
    write_pictures(tmp_path / "src" / "good", numbered(3))
    make_archive(tmp_path / "src" / "x.tar.gz", pictures("c"))

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare.archives, "whole_file", full)
    with pytest.raises(UserError, match="x.tar.gz.*No space"):
        made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert not (tmp_path / "dst").exists()


def test_backslashes_are_separators_in_a_zip_of_windows(tmp_path):
    files = {
        name.replace("/", "\\"): data
        for folder in ("x/a", "x/b")
        for name, data in pictures(folder).items()
    }
    make_zip(tmp_path / "a.zip", files)
    data = (tmp_path / "a.zip").read_bytes()
    assert b"x\\a\\000.png" in data
    _, clips = made.pack(tmp_path / "a.zip", tmp_path / "dst", 16)
    assert [name.split("/")[-1] for name in clips.names] == ["a", "b"]
    assert numbers(clips, 1) == list(range(4))


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "folder"])
def test_one_wrapper_around_everything_is_looked_through(tmp_path, name):
    files = {}
    for k, clip in enumerate(("cat/one", "cat/two", "dog/one")):
        files |= {
            f"my data set v2/{member}": data for member, data in pictures(clip, 3 + k).items()
        }
    files["my data set v2/dataset.json"] = b'{"labels": {"cat/one": 0, "cat/two": 0, "dog/one": 1}}'
    if name == "folder":
        for member, data in files.items():
            (tmp_path / name / member).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / member).write_bytes(data)
    else:
        make_archive(tmp_path / name, files)
    _, by_table = made.pack(tmp_path / name, tmp_path / "dst", 16)
    index, by_folder = made.pack(tmp_path / name, tmp_path / "dst2", 16, labels="folders")
    assert by_table.labels.tolist() == by_folder.labels.tolist() == [0, 0, 1]
    assert index["labels"]["classes"] == ["cat", "dog"]


def test_an_archive_in_an_archive_is_named_and_not_opened(tmp_path):
    inner = make_zip(tmp_path / "inner.zip", pictures("b")).read_bytes()
    tar = make_tar(tmp_path / "inner.tar.gz", pictures("c")).read_bytes()
    make_zip(
        tmp_path / "a.zip",
        pictures("a") | {"parts/inner.zip": inner, "parts/inner.tar.gz": tar, "x.7z": b"7z"},
    )
    index, clips = made.pack(tmp_path / "a.zip", tmp_path / "dst", 16)
    assert clips.names == ["a"]
    for name in ("inner.zip", "inner.tar.gz", "x.7z"):
        assert made.notes_on(index, name), name


def spoil_zip(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "encrypted":  # the bit that says so, in both places of every member
        for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            at = data.find(signature)
            while at >= 0:
                data[at + offset] |= 1
                at = data.find(signature, at + 4)
    if kind == "unknown method":
        for signature, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
            at = data.find(signature)
            while at >= 0:
                data[at + offset] = 95
                at = data.find(signature, at + 4)
    if kind == "flipped":
        data[60] ^= 255  # in the first member
    if kind == "cut":
        del data[len(data) // 2 :]
    if kind == "rubbish":
        data[:] = b"PK\3\4" + bytes(200)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "kind",
    ["encrypted", "unknown method", "flipped", "cut", "rubbish", "empty", "no bytes", "lzma"],
)
def test_zips_that_cannot_be_read_are_named(tmp_path, kind):
    src = tmp_path / "src"
    write_pictures(src / "good", numbered(3))
    method = zipfile.ZIP_LZMA if kind == "lzma" else zipfile.ZIP_DEFLATED
    make_zip(src / "bad.zip", {} if kind == "empty" else pictures("x"), method)
    spoil_zip(src / "bad.zip", kind)
    if kind == "no bytes":
        (src / "bad.zip").write_bytes(b"")
    index, clips = made.pack(src, tmp_path / "dst", 16)
    assert "good" in clips.names
    if kind == "lzma" and len(clips) == 2:  # Python can read it
        assert numbers(clips, 0) == list(range(4))
    else:
        assert made.notes_on(index, "bad.zip"), index["notes"]
    if len(clips) == 1:
        with pytest.raises(UserError) as error:
            made.pack(src / "bad.zip", tmp_path / "alone", 16)
        assert "bad.zip" in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "alone").exists() or not list((tmp_path / "alone").iterdir())


@pytest.mark.parametrize("name", ["bad.tar", "bad.tar.gz", "bad.tar.xz", "bad.tgz"])
@pytest.mark.parametrize("kind", ["cut", "rubbish", "empty", "no bytes"])
def test_tars_that_cannot_be_read_are_named(tmp_path, name, kind):
    src = tmp_path / "src"
    write_pictures(src / "good", numbered(3))
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    more = {f"y/{k}.png": png(noise) for k in range(6)}
    path = make_tar(src / name, {} if kind == "empty" else pictures("x") | more)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    if kind == "rubbish":
        path.write_bytes(b"not a tar at all " * 99)
    if kind == "no bytes":
        path.write_bytes(b"")
    index, clips = made.pack(src, tmp_path / "dst", 16)
    assert "good" in clips.names and made.notes_on(index, "bad."), index["notes"]
    for k in range(len(clips)):
        if clips.names[k].endswith("x"):
            assert numbers(clips, k) == list(range(len(numbers(clips, k))))


def test_a_tar_under_a_plain_name_and_under_a_wrong_one(tmp_path):
    """Compressed or not is told by the bytes: downloads are renamed."""
    make_tar(tmp_path / "x.tar.gz", pictures("a")).rename(tmp_path / "zipped.tar")
    make_tar(tmp_path / "x.tar", pictures("a")).rename(tmp_path / "plain.tar.gz")
    for name in ("zipped.tar", "plain.tar.gz"):
        _, clips = made.pack(tmp_path / name, tmp_path / f"dst {name}", 16)
        assert clips.names == ["a"] and numbers(clips) == list(range(4)), name


def test_links_pipes_and_devices_in_a_tar(tmp_path):
    write_pictures(tmp_path / "secret", numbered(4, 16, 16))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (pictures("./good") | pictures("twice") | pictures("twice")).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for k in range(4):
            info = tarfile.TarInfo(f"linked/{k:03d}.png")
            info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret" / f"{k:03d}.png")
            archive.addfile(info)
            info = tarfile.TarInfo(f"pipes/{k:03d}.png")
            info.type = (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE)[k]
            archive.addfile(info)
    _, clips = made.pack(tmp_path / "a.tar", tmp_path / "dst", 16)
    assert clips.names == ["good", "twice"] and numbers(clips, 0) == list(range(4))


def test_bombs_in_archives_are_refused(tmp_path):
    src = tmp_path / "src"
    write_pictures(src / "good", numbered(3))
    make_zip(src / "a.zip", pictures("a") | {f"bomb/{k}.png": bytes(40 << 20) for k in range(3)})
    data = make_zip(
        src / "b.zip", {"x/0.png": png(numbered(1)[0]), "x/1.png": bytes(99)}
    ).read_bytes()
    at = data.index(b"PK\1\2")
    (src / "b.zip").write_bytes(
        data[: at + 24] + (0xFFFFFF00).to_bytes(4, "little") + data[at + 28 :]
    )
    with tarfile.open(src / "c.tar.xz", "w:xz", preset=0) as archive:
        for k in range(3):
            info = tarfile.TarInfo(f"bomb/{k}.png")
            info.size = 40 << 20
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    info = tarfile.TarInfo("x/0.png")
    info.size = 10**12
    (src / "d.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with made.at_most(seconds=60, megabytes=800):
        index, clips = made.pack(src, tmp_path / "dst", 16)
    assert {name.split("/")[-1] for name in clips.names} == {"good", "a"}
    for name in ("a.zip", "b.zip", "c.tar.xz", "d.tar"):
        assert made.notes_on(index, name), name


# ----------------------------------------------------------------------- playlists, strange names


@pytest.fixture
def server():
    """An address that counts who asks."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", asked
    listening.shutdown()


def playlists(secret, address):
    """{name: text} of lists that name a file or an address, under honest and dishonest suffixes."""

    def m3u8(target):
        head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:3\n#EXT-X-MEDIA-SEQUENCE:0\n"
        return f"{head}#EXTINF:2.0,\n{target}\n#EXT-X-ENDLIST\n"

    concat = f"ffconcat version 1.0\nfile '{secret}'\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
        ' mediaPresentationDuration="PT2S" minBufferTime="PT1S"'
        ' profiles="urn:mpeg:dash:profile:full:2011"><Period duration="PT2S"><AdaptationSet>'
        '<Representation id="1" mimeType="video/mp4" bandwidth="1" width="64" height="48">'
        f'<BaseURL>{address}/d.mp4</BaseURL><SegmentList><SegmentURL media="{address}/d.mp4"/>'
        "</SegmentList></Representation></AdaptationSet></Period></MPD>"
    )
    session = (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    )
    files = {
        "l.mpd": dash,
        "l.sdp": session + "a=rtpmap:96 H264/90000\n",
        "l.m3u": f"{secret}\n",
        "l.pls": secret,
    }
    for k, end in enumerate(
        (".m3u8", ".mp4", ".mkv", ".avi", ".ts", ".webm", ".mov", "", ".gif", ".png")
    ):
        files |= {f"local{end}": m3u8(secret), f"url{end}": m3u8(f"{address}/{k}.ts")}
        files |= {f"concat{end}": concat, f"dash{end}": dash}
    files |= {"l.ffconcat": concat, "l.concat": concat, "file.m3u8": m3u8(f"file:{secret}")}
    files |= {"crypto.m3u8": m3u8(f"crypto:{secret}"), "cat.mp4": m3u8(f"concat:{secret}")}
    files |= {
        "sub.mp4": m3u8(f"subfile,,start,0,end,0,,:{secret}"),
        "data.mp4": m3u8("data:video/mp2t;base64,AAAA"),
    }
    return files


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_playlists_read_no_other_file_and_open_no_connection(tmp_path, server, form):
    address, asked = server
    secret = tmp_path / "secret.ts"
    write_video(secret, numbered(20), codec="mpeg2video")
    good, lists = pictures("good"), playlists(secret, address)
    files = good | {
        name: text.encode() if isinstance(text, str) else str(text).encode()
        for name, text in lists.items()
    }
    if form == "zip":
        src = make_zip(tmp_path / "src.zip", files)
    else:
        src = tmp_path / "src"
        for name, data in files.items():
            (src / name).parent.mkdir(parents=True, exist_ok=True)
            (src / name).write_bytes(data)
    index, clips = made.pack(src, tmp_path / "dst", 16)
    assert clips.names == ["good"] and asked == []
    told = sum(note["count"] for note in index["notes"])
    assert told >= len(lists) and made.notes_on(index, "playlist")


def test_a_playlist_given_alone_is_refused(tmp_path, server):
    secret = tmp_path / "secret.ts"
    write_video(secret, numbered(20), codec="mpeg2video")
    for name in ("l.m3u8", "l.mp4"):
        (tmp_path / name).write_text(playlists(secret, server[0])["local.m3u8"])
        with pytest.raises(UserError, match=name) as error:
            made.pack(tmp_path / name, tmp_path / "dst", 16)
        assert "\n" not in str(error.value) and server[1] == []


STRANGE = [
    b"sm\xc3\xb6rg\xc3\xa5s",
    b"not utf8 \xff\xfe",
    b"\xf0\x9f\x90\xb1 cat",
    b"new\nline",
    b"tab\there",
    b"%03d",
    b"frame%d.x",
    b"'single' \"double\"",
    b"-dash",
    b"--resolution",
    b"a:b",
    b"http:",
    b"*?[x]",
    b"back\\slash",
    b" spaces ",
    b"dots..",
    b"\xe2\x80\xaertl",
    b"\x1b[31mred",
    b"e\xcc\x81",
    b"\xc3\xa9",
    b"x" * 240,
    b"CON",
    b"#hash",
    b"$HOME",
    b"`ls`",
    b"a;b|c",
]


@pytest.mark.parametrize("kind", ["videos", "folders"])
def test_names_of_every_kind(tmp_path, kind):
    """As names of videos and of folders; they are packed, shown on one line, and stored as text."""
    src = os.fsencode(tmp_path / "src")
    os.mkdir(src)
    write_video(tmp_path / "v.mp4", numbered(4, 16, 16))
    for name in STRANGE:
        if kind == "videos":
            with open(os.path.join(src, name + b".mp4"), "wb") as file:
                file.write((tmp_path / "v.mp4").read_bytes())
        else:
            os.mkdir(os.path.join(src, name))
            for k, image in enumerate(numbered(4, 16, 16)):
                with open(os.path.join(src, name, b"%d.png" % k), "wb") as file:
                    file.write(png(image))
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert len(set(clips.names)) == len(clips) == len(STRANGE)
    assert all(numbers(clips, k) == [0, 1, 2, 3] for k in range(len(clips)))
    (tmp_path / "dst" / "index.json").read_text(encoding="utf-8").encode("utf-8")
    assert all(
        file.isascii() and "/" not in file and "\n" not in file for file in index["clips"]["file"]
    )
    assert prepare.check(tmp_path / "dst") == []


def run(*arguments, **more):
    command = [sys.executable, "-m", "mostgan.prepare", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONIOENCODING": ""}
    return subprocess.run(command, capture_output=True, env=environment, timeout=120, **more)


def test_the_summary_has_one_line_each_whatever_the_names(tmp_path):
    """In the C locale, whose terminal takes ASCII only; SRC itself has such a name."""
    src = os.path.join(os.fsencode(tmp_path), b"-odd \xff\n\xf0\x9f\x90\xb1")
    os.mkdir(src)
    for name in (b"new\nline.mp4", b"\xff.mp4", b"esc\x1b[2J.mp4"):
        with open(os.path.join(src, name), "wb") as file:
            file.write(b"junk" * 50)
    write_video(tmp_path / "v.mp4", numbered(4, 16, 16))
    os.rename(tmp_path / "v.mp4", os.path.join(src, b"good\r\n\xfe.mp4"))
    done = run(os.path.join(b".", os.path.basename(src)), "dst", "--resolution", "16", cwd=tmp_path)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    text = done.stdout + done.stderr
    assert b"\x1b" not in text and not any(
        line.startswith(b"line.mp4") for line in text.splitlines()
    )
    done = run("--check", "dst", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_links_that_lead_in_circles_and_nowhere_and_pipes(tmp_path):
    src = tmp_path / "src"
    write_pictures(src / "a", numbered(3))
    (src / "a" / "circle").symlink_to(src)
    (src / "here").symlink_to(".")
    (src / "nowhere.mp4").symlink_to("gone.mp4")
    os.mkfifo(src / "pipe.mp4")
    write_video(tmp_path / "elsewhere" / "b.mp4", numbered(4))
    (src / "linked.mp4").symlink_to(tmp_path / "elsewhere" / "b.mp4")
    index, clips = made.pack(src, tmp_path / "dst", 16)
    assert "a" in clips.names and "linked.mp4" in clips.names and len(clips) == 2
    assert made.notes_on(index, "nowhere.mp4") and made.notes_on(index, "pipe.mp4")


# ------------------------------------------------------------------------ what people leave about

LITTER = [
    "Thumbs.db",
    ".DS_Store",
    "desktop.ini",
    "@eaDir/a.mp4/SYNOFILE_THUMB_M.jpg",
    "@eaDir/a.mp4/SYNOFILE_THUMB_S.jpg",
    "__MACOSX/._a.mp4",
    "._a.mp4",
    ".hidden.mp4",
    "LICENSE",
    "README.md",
    "readme.txt",
    "checksums.md5",
    "a.mp4.sha256",
    "paper.pdf",
    "song.mp3",
    "sound.wav",
    "voice.m4a",
    "music.flac",
    "a.srt",
    "a.vtt",
    "a.ass",
    "a.json",
    "a.info.json",
    "meta.csv",
    "notes.docx",
    "annotations.xml",
    "model.pth",
    "script.py",
    "a.mp4.part",
    "b.crdownload",
    ".git/config",
    "sample.npy.json",
    "poses.npz",
    "a.nfo",
    "Makefile",
    "photoshop.psd",
    "$RECYCLE.BIN/x.mp4",
    "log.txt",
    "a.torrent",
]


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    for name in ("good", "closed", "lost+found"):
        write_pictures(tmp_path / "src" / name, numbered(3))
    scandir = os.scandir  # tests may run as root, for whom no folder is closed

    def closed(path):
        if os.path.basename(path) in ("closed", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert clips.names == ["good"] and made.notes_on(index, "left out", "closed", "folder")
    assert not made.notes_on(index, "lost+found")  # it belongs to the system


def test_what_people_leave_lying_about_is_counted_by_kind(tmp_path):
    src = tmp_path / "src"
    write_video(src / "a.mp4", numbered(6))
    write_pictures(src / "frames", numbered(5))
    thumbnail = io.BytesIO()
    Image.fromarray(made.moving(1)[0]).save(thumbnail, "JPEG")
    for name in [
        *LITTER,
        "frames/Thumbs.db",
        "frames/.DS_Store",
        "frames/LICENSE",
        "frames/._000.png",
    ]:
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        whole = {
            ".mp3": b"ID3\4" + bytes(500),
            ".jpg": thumbnail.getvalue(),
            ".wav": b"RIFF" + bytes(99),
        }
        (src / name).write_bytes(whole.get(Path(name).suffix, b"some text\n" * 20))
    index, clips = made.pack(src, tmp_path / "dst", 16)
    assert clips.names == ["a.mp4", "frames"]
    assert numbers(clips, 0) == list(range(6)) and numbers(clips, 1) == list(range(5))
    ignored = [note for note in index["notes"] if note["count"] > 1]
    assert sum(note["count"] for note in index["notes"]) >= 25 and ignored
    assert len(index["notes"]) <= 12  # by kind, not by file


def test_covers_beside_frames_are_no_frames(tmp_path):
    write_pictures(tmp_path / "src" / "a", numbered(6), ".jpg", quality=95)
    for name in ("cover.jpg", "folder.jpg", "poster.png"):
        Image.fromarray(made.moving(1)[0]).save(tmp_path / "src" / "a" / name)
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    assert clips.names == ["a"] and numbers(clips) == list(range(6))
    for name in ("cover.jpg", "folder.jpg", "poster.png"):
        assert made.notes_on(index, name), name


def test_pictures_with_the_stems_of_videos_are_thumbnails(tmp_path):
    src, picture = tmp_path / "src", Image.fromarray(made.moving(1)[0])
    for k in range(4):
        write_video(src / f"clip{k}.mp4", numbered(4 + k))
        picture.save(src / f"clip{k}.jpg")
        picture.save(src / f"clip{k}.mp4.png")
    for k, end in enumerate(("-thumb", "_poster", ".preview", "-thumbnail")):
        picture.save(src / f"clip{k}{end}.jpg")
    write_pictures(src / "frames", numbered(5))
    index, clips = made.pack(src, tmp_path / "dst", 32)
    assert sorted(clips.names) == ["clip0.mp4", "clip1.mp4", "clip2.mp4", "clip3.mp4", "frames"]
    told = made.notes_on(index, "clip0")
    assert sum(note["count"] for note in told) >= 8


def test_thumbnails_in_a_folder_of_their_own(tmp_path):
    src, picture = tmp_path / "src", Image.fromarray(made.moving(1)[0])
    (src / "thumbs").mkdir(parents=True)
    for k in range(4):
        write_video(src / "videos" / f"clip{k}.mp4", numbered(4))
        picture.save(src / "thumbs" / f"clip{k}.jpg")
    index, clips = made.pack(src, tmp_path / "dst", 32)
    assert [name.split("/")[-1] for name in clips.names] == [
        "clip0.mp4",
        "clip1.mp4",
        "clip2.mp4",
        "clip3.mp4",
    ]
    assert made.notes_on(index, "clip0.jpg") or made.notes_on(index, "thumbs")


@pytest.mark.parametrize(
    "prefixes", [("a_", "b_"), ("left", "right"), ("cam1_", "cam2_"), ("take-1-", "take-2-")]
)
def test_two_numbered_sequences_in_one_folder_are_two_clips(tmp_path, prefixes):
    for prefix, n in zip(prefixes, (4, 6)):
        write_pictures(tmp_path / "src" / "shots", numbered(n), name=prefix + "{:03d}")
    write_pictures(tmp_path / "src" / "other", numbered(3))
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    assert sorted(clips.lengths.tolist()) == [3, 4, 6] and len(set(clips.names)) == 3
    assert all(numbers(clips, k) == list(range(clips.lengths[k])) for k in range(3))


def test_names_that_would_be_the_same_are_told_apart(tmp_path):
    for name in ("a", "a (2)"):
        write_pictures(tmp_path / "src" / name, numbered(3))
    for letter in "ab":
        write_pictures(tmp_path / "src", numbered(4), name=letter + "_{}")
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert len(set(clips.names)) == 4 and sorted(clips.lengths) == [3, 3, 4, 4]


def test_a_packed_folder_among_the_sources_is_no_source(tmp_path):
    write_pictures(tmp_path / "src" / "a", numbered(3))
    made.pack(tmp_path / "src", tmp_path / "src" / "packed", 16)
    (tmp_path / "src" / "begun").mkdir()
    for file in (tmp_path / "src" / "packed").glob("*.safetensors"):
        (tmp_path / "src" / "begun" / file.name).write_bytes(file.read_bytes())
    _, clips = made.pack(tmp_path / "src", tmp_path / "again", 16)
    assert clips.names == ["a"]


@pytest.mark.parametrize(
    "make", ["missing", "empty", "only text", "all broken", "one picture", "too short"]
)
def test_nothing_to_pack_is_one_line(tmp_path, make):
    src = tmp_path / "src"
    if make != "missing":
        src.mkdir()
    if make == "only text":
        (src / "readme.txt").write_text("no videos here")
    if make == "all broken":
        (src / "a.mp4").write_bytes(b"junk" * 99)
    if make == "one picture":
        write_pictures(src / "a", numbered(1))
    if make == "too short":
        write_video(src / "b.mp4", numbered(2))
    with pytest.raises(UserError) as error:
        made.pack(src, tmp_path / "dst", 32)
    assert "\n" not in str(error.value) and len(str(error.value)) > 20
    assert make not in ("all broken", "too short") or ".mp4" in str(error.value)
    assert not (tmp_path / "dst" / "index.json").exists()
