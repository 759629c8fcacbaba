"""Reading videos with PyAV (FFmpeg): their times, frames from any place on, each made upright,
square and RGB.

What is damaged in a video does not end it: `errors`, a dict {time in seconds: what was reported},
takes note of it.
"""

from itertools import chain, islice

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData

from mostgan.prepare.frames import PICTURE_RATE, ROUNDING, Shown, Timing, square, usual_rate

av.logging.set_level(av.logging.PANIC)

# Containers that are read. Playlists (hls, concat, dash, sdp, imf, …) are not among them: they name
# other files and addresses, which FFmpeg would open. Nor are patterns of picture files. (jpeg_pipe
# is what FFmpeg takes some .mjpeg files for: JPEGs one after the other in a file.)
CONTAINERS = "mov matroska avi mpegts mpeg mpegvideo asf flv ogg mxf h264 hevc m4v yuv4mpegpipe"
CONTAINERS = ",".join(f"{CONTAINERS} ivf obu dv rm nut wtv mjpeg jpeg_pipe vc1".split())
UNSEEKABLE = "avi mpeg mpegvideo h264 hevc m4v mjpeg jpeg_pipe yuv4mpegpipe dv vc1 obu ivf"
UNSEEKABLE = set(UNSEEKABLE.split())
# Of one frame: twice 8K. A file that claims more is damaged, or meant to fill the memory.
MAX_PIXELS = 1 << 26
LARGE_STEP = 1.0  # seconds back in time that are no rounding
LOOK = 2000  # packets that tell the rate
MOST_ERRORS = 1000  # damaged packets after which a film is given up
# Seconds; a film that claims more has damaged timestamps, and is read in one go.
LONGEST_FILM = 48 * 3600.0
# AVCOL_TRC number → (name, FFmpeg's name)
HDR = {16: ("PQ", "smpte2084"), 18: ("HLG", "arib-std-b67")}
ALPHA = "video with an alpha channel, shown over black"
HDR_FLAT = "HDR video, without tone mapping (this FFmpeg has none)"


def open_video(file):
    """A container and its largest video stream that is no cover picture. file: a path, or a
    seekable binary file.

    Raises ValueError for playlists, files without video and frames that are too large;
    av.FFmpegError, OSError.
    """
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    if hasattr(file, "read"):
        file.seek(0)
    else:
        file = f"file:{file}"  # FFmpeg would take a name like "a:b.mp4" for a protocol
    try:
        container = av.open(file, metadata_errors="replace", container_options=options)
    except av.ArgumentError:
        raise ValueError("it is a playlist, or another kind of file that is not read") from None
    try:
        return container, _choose_stream(container)
    except ValueError:
        container.close()
        raise


def _choose_stream(container):
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        raise ValueError("it has no video that can be decoded")
    stream = max(streams, key=lambda stream: stream.width * stream.height)
    if stream.width * stream.height > MAX_PIXELS:
        raise ValueError(f"its frames claim {stream.width}x{stream.height} pixels, too many")
    stream.codec_context.thread_count = 1  # there are as many processes as cores
    # Without output_corrupt, HEVC is silent from an error to the next key frame.
    stream.codec_context.options = {"flags": "+output_corrupt", "max_pixels": str(MAX_PIXELS)}
    return stream


# ----------------------------------------------------------------------------------------- decoding


def _decoded(container, stream, errors):
    """Yields av.VideoFrames in the order of their times. A damaged packet costs what hangs on it,
    not the film. Damaged frames at the beginning are left out: where a recording was cut, all that
    they hang on is missing, and they are gray.
    """
    count, begun = len(errors), False
    for packet in _packets(container, stream, errors):
        time = packet_time(packet)
        if packet.size and packet.is_corrupt:
            errors.setdefault(time, "a packet is damaged")
        try:
            for frame in packet.decode():
                if frame.is_corrupt:
                    errors.setdefault(frame.time, "a frame is damaged")
                begun = begun or not frame.is_corrupt
                if begun:
                    yield frame
        except av.FFmpegError as error:
            errors.setdefault(time, error.strerror)
            if len(errors) - count > MOST_ERRORS:
                raise ValueError(f"more than {MOST_ERRORS} of its packets are damaged") from None


def _packets(container, stream, errors):
    """Yields the packets up to where the file cannot be read any more, and then the one that
    empties the decoder.
    """
    time = None
    try:
        for packet in container.demux(stream):
            time = packet_time(packet) if packet.size else time
            yield packet
    except av.FFmpegError as error:  # a file that was cut off
        errors.setdefault(time, error.strerror)
        empty = av.Packet()
        empty.stream = stream
        yield empty


def packet_time(packet):
    """When a packet's frame is shown, in seconds, or None."""
    stamp = packet.pts if packet.pts is not None else packet.dts
    return None if stamp is None else float(stamp * packet.time_base)


def _timed(frames, rate, errors):
    """av.VideoFrames → Shown. Those without a time follow the one before; those that go back in
    time are left out, and told where two recordings were joined.

    Each lasts 1/rate by itself: files that declare a wrong rate would hold the last one for too
    long, or not at all.
    """
    before = None
    for frame in frames:
        time = frame.time
        if time is None:
            time = 0.0 if before is None else before + 1 / rate
        if before is None or time > before:
            yield Shown(time, 1 / rate, frame)
            before = time
        elif time < before - LARGE_STEP:
            errors.setdefault(before, "its timestamps go back, those frames are left out")


# ------------------------------------------------------------------------------------------- timing


def video_timing(file, searched):
    """(Timing, pixel aspect) of a video, from its first packets and its first frame.

    searched: whether to find out its length and where decoding can start, too; else they are None.
    """
    container, stream = open_video(file)
    with container:
        aspect = float(stream.sample_aspect_ratio or 1)
        stated = stream.average_rate or stream.guessed_rate or PICTURE_RATE
        try:
            packets = list(islice((p for p in container.demux(stream) if p.size), LOOK))
        except av.FFmpegError:
            packets = []  # it is cut off early: what can be decoded will show
        times = [packet_time(packet) for packet in packets]
        meant = [t for t, packet in zip(times, packets) if t is not None and not packet.is_discard]
        keys = [time for time, packet in zip(times, packets) if packet.is_keyframe]
    whole = len(packets) < LOOK
    rate = usual_rate(times if whole else times[:-16], stated)  # the last ones may be out of order
    container, stream = open_video(file)
    with container:
        errors = {}
        first = next(_timed(_decoded(container, stream, errors), rate, errors), None)
        if first is None:
            reason = next(iter(errors.values()), "it is empty")
            raise ValueError(f"no frame of it can be read ({reason})")
        missing = max(0.0, first.time - min(meant)) if errors and meant else 0.0
        timing = Timing(rate, first.time, missing=missing)
        if not searched or container.format.name in UNSEEKABLE or not keys or None in times:
            return timing, aspect
        end = max(times) + 1 / rate if whole else _end(container, stream)
        if end is None or not 0 < end - first.time < LONGEST_FILM:
            return timing, aspect
        gap = float(np.diff(sorted(keys), append=max(times)).max())
        return Timing(rate, first.time, end - first.time, gap, missing), aspect


def _end(container, stream):
    """When the last frame ends: told by what lies behind the last place that can be sought. None:
    there is no such place.

    The lengths that files state may count from 0 instead of from their first frame, or be those of
    a film before it was cut off. And some films (intra refresh) have places to go to, but no frame
    there that needs no other.
    """
    try:
        container.seek(1 << 62, stream=stream, backward=True)
        shown, found = None, False
        for shown in islice(_timed(_decoded(container, stream, {}), 1, {}), LOOK):
            found = found or shown.image.key_frame
    except (av.FFmpegError, ValueError):
        return None
    return shown.time + shown.duration if found else None


# ------------------------------------------------------------------------- frames from a place on


def video_frames(file, timing, time, errors):
    """Yields Shown from the one on screen at `time` (seconds of the file; None: from the start), or
    a few before it.
    """
    back = 0.5
    while time is not None and time - back > timing.start:
        container, stream = open_video(file)
        with container:
            try:
                container.seek(int((time - back) / stream.time_base), stream=stream, backward=True)
            except av.FFmpegError:
                break
            frames = _decoded(container, stream, errors)
            key = next((f for f in frames if f.key_frame and f.time is not None), None)
            if key is not None and key.time <= time - ROUNDING:
                yield from _to_the_end(container, stream, chain([key], frames), timing.fps, errors)
                return
        back *= 4  # it went too far: open groups of pictures, or places that are times of decoding
    container, stream = open_video(file)
    with container:
        frames = _decoded(container, stream, errors)
        yield from _to_the_end(container, stream, frames, timing.fps, errors)


def _to_the_end(container, stream, frames, rate, errors):
    """Yields Shown; takes note where they end before the length that the file states."""
    end = None
    for shown in _timed(_deinterlaced(frames), rate, errors):
        end = shown.time + float((shown.image.duration or 0) * shown.image.time_base)
        yield shown
    stated, slack, of_video = (container.duration or 0) / av.time_base, 4 / rate, True
    if stream.duration is not None:
        stated = float(stream.duration * stream.time_base)
    elif len(container.streams) > 1:  # the length may be that of the sound
        slack, of_video = 1.0, False
    if end is None or stated > LONGEST_FILM or stated - end <= slack:
        return
    if of_video or not _goes_on(container, stated - slack):
        errors.setdefault(end, f"it ends {stated - end:.1f} s before the length that it states")


def _goes_on(container, time):
    """Whether anything in a file, sound for example, comes after a time in seconds."""
    try:
        container.seek(int(time * av.time_base))
        times = (packet_time(packet) for packet in container.demux())
        return any(stamp is not None and stamp >= time for stamp in times)
    except av.FFmpegError:
        return False


def _graph(frame, *filters):
    """A filter graph that takes frames like this one. filters: (name, arguments)."""
    graph = av.filter.Graph()
    graph.threads = 1
    # Not add_buffer: it states a pixel aspect and colours of its own.
    about = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
    about += f":time_base={frame.time_base or '1/1000'}:pixel_aspect=1/1"
    nodes = [graph.add(*item) for item in [("buffer", about), *filters, ("buffersink", None)]]
    graph.link_nodes(*nodes).configure()
    return graph


def _pulled(graph):
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def _deinterlaced(frames):
    """The frames, interlaced ones made whole: every other line is of a later moment."""
    graph, shape = None, None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if shape != (frame.width, frame.height, frame.format.name):
            if graph is not None:
                graph.vpush(None)
                yield from _pulled(graph)
            graph = _graph(frame, ("bwdif", "mode=send_frame:deint=interlaced"))
            shape = frame.width, frame.height, frame.format.name
        graph.vpush(frame)
        yield from _pulled(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _pulled(graph)


# --------------------------------------------------------------------------------------- the square


class VideoFraming:
    """av.VideoFrame → uint8 [R, R, 3]: turned upright, cropped in the shape in which it is shown,
    scaled, tone-mapped.

    crop, pixel_aspect: as in frames.square. facts: a set that takes what a user should know about
    the conversion.
    """

    def __init__(self, crop, resolution, pixel_aspect, facts):
        self.crop, self.resolution, self.pixel_aspect = crop, resolution, pixel_aspect
        self.facts, self.graphs = facts, {}

    def __call__(self, frame):
        colours = frame.colorspace, frame.color_range, frame.color_trc
        key = frame.width, frame.height, frame.format.name, *colours
        if key not in self.graphs:
            self.graphs[key] = self._make_graph(frame)
        self.graphs[key].vpush(frame)
        return self.graphs[key].vpull().to_ndarray()

    def _make_graph(self, frame):
        turns, turned = _turns(frame)
        width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
        aspect = 1 / self.pixel_aspect if turned else self.pixel_aspect
        x, y, w, h = square(width, height, self.crop, aspect)
        filters = list(turns)
        if (w, h) != (width, height):
            if self.crop != "center":  # to the pixel, where colours are stored for two at a time
                fine = "rgb24|rgb48" if frame.format.is_rgb else "yuv444p|yuv444p16"
                filters.append(("format", f"pix_fmts={fine}"))
            filters.append(("crop", f"{w}:{h}:{x}:{y}"))
        scale = f"{self.resolution}:{self.resolution}"
        scale += ":flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
        # Unspecified: BT.709 where it is large, as players do.
        if frame.colorspace == 2 and frame.height >= 720:
            scale += ":in_color_matrix=bt709"
        rgb = [("format", "pix_fmts=rgb24")]
        if any(component.is_alpha for component in frame.format.components):
            self.facts.add(ALPHA)
            rgb = [("format", "pix_fmts=gbrap"), ("premultiply", "inplace=1"), *rgb]
        if frame.color_trc in HDR:
            name, transfer = HDR[frame.color_trc]
            told = ("setparams", f"color_trc={transfer}:color_primaries=bt2020:colorspace=bt2020nc")
            mapped = scale + ":out_transfer=bt709:out_primaries=bt709:out_color_matrix=bt709"
            mapped += ":intent=perceptual"
            try:
                graph = _graph(frame, *filters, told, ("scale", mapped), *rgb)
                self.facts.add(f"HDR video ({name}), tone-mapped to BT.709")
                return graph
            except av.FFmpegError:  # FFmpeg 7 has no tone mapping in its scaler
                self.facts.add(HDR_FLAT)
        return _graph(frame, *filters, ("scale", scale), *rgb)


def _turns(frame):
    """(filters that turn a frame as its display matrix says, whether they swap its sides)."""
    # Asked only once per graph: a frame whose side data were asked for stays in memory until Python
    # collects cycles.
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return [], False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]  # x' = a x + c y, y' = b x + d y
    turned = abs(int(a)) < abs(int(b))
    across, down = (c, b) if turned else (a, d)
    filters = [("transpose", "dir=cclock_flip")] if turned else []  # swaps x and y
    filters += [("hflip", None)] if across < 0 else []
    filters += [("vflip", None)] if down < 0 else []
    return filters, turned
