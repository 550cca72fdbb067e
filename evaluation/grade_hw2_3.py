"""Grades Textual Inversion as the course does: CLIP ViT-B/32, the best 5 of 25 pictures a prompt.

    python3 evaluation/grade_hw2_3.py --json_path hw2_data/textual_inversion/input.json \
        --input_dir hw2_data/textual_inversion --output_dir output/p3 --json output/p3/scores.json

Image score: 100 * mean cosine to the source images. Text score: CLIP's logit (100 * cosine) for prompt_4_clip_eval.
The five with the largest image + 2.5 * text are averaged; both averages must reach the JSON's baseline.
"""

from __future__ import annotations

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from p3_clip import best_fifth, fifth, image_scores, load_clip, text_scores  # noqa: E402
from p3_concepts import GRADED_TYPES, image_files, read_concepts  # noqa: E402
from utils import Parser, UserError, cli, output_file, pick_device, save_json  # noqa: E402

PICTURES = 25


def generated(folder):
    """The 25 pictures of one prompt; UserError for any other number of them. Files of other kinds do not count."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run hw2_3.sh with this output folder first")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in GRADED_TYPES)
    if len(files) != PICTURES:
        raise UserError(f"{folder}: holds {len(files)} pictures where exactly {PICTURES} are graded")
    return files


def grade(concepts, input_dir, output_dir, clip):
    """Prints each prompt's scores, and yields its result as --json writes it: every picture's scores, which five count,
    their means and the baseline. Files are named from output_dir; all its folders are looked at first."""
    folders = {c.key: [generated(output_dir / c.key / str(i)) for i in range(len(c.prompts))] for c in concepts}
    for concept in concepts:
        files = image_files(input_dir / concept.key)
        sources = clip.images(files)
        for i, drawn in enumerate(folders[concept.key]):
            pictures = clip.images(drawn)
            image, text = image_scores(clip, pictures, sources), text_scores(clip, pictures, concept.eval_prompts[i])
            scores, counted = best_fifth(image, text), fifth(image, text).tolist()
            baseline = concept.baseline[i] if concept.baseline else None
            good = bool(baseline) and all(have >= want for have, want in zip(scores, baseline))
            print(f'source {concept.key} prompt {i} "{concept.prompts[i]}":')
            print(course_lines(*scores, baseline, good), flush=True)
            yield {
                "token": concept.token,
                "prompt": concept.prompts[i],
                "eval_prompt": concept.eval_prompts[i],
                "sources": [os.path.relpath(f, output_dir) for f in files],
                "image": scores[0],
                "text": scores[1],
                "baseline": baseline,
                "passed": good,
                "pictures": [
                    {"file": os.path.relpath(f, output_dir), "image": a, "text": b, "counts": j in counted}
                    for j, (f, a, b) in enumerate(zip(drawn, image.tolist(), text.tolist()))
                ],
            }


def course_lines(image, text, baseline, good):
    """One prompt's result in the words of the course's grader, which other scripts look for."""
    lines = [f"CLIP Image Score: {image:.2f}", f"CLIP Text Score: {text:.2f}"]
    if baseline:
        lines.append(f"{'PASS' if good else 'Fail!'} Baseline is {baseline[0]:.2f}/{baseline[1]:.2f}")
    return "\n".join(lines)


@cli
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--json_path", required=True, help="the JSON with prompts and baselines")
    parser.add_argument("--input_dir", required=True, help="the folder with the source images, one subfolder a concept")
    parser.add_argument("--output_dir", required=True, help="what hw2_3.sh wrote")
    parser.add_argument("--clip", default="ViT-B/32", help="OpenAI or hub name, folder, or file in OpenAI's format")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also writes every picture's scores there")
    parser.add_argument("--device", type=pick_device, default="auto")
    args = parser.parse_args(argv)
    concepts = read_concepts(args.json_path)
    for concept in concepts:
        if not concept.eval_prompts:
            raise UserError(f'{args.json_path}: entry "{concept.key}" needs the key "prompt_4_clip_eval" to be graded')
    clip = load_clip(args.clip, args.device)
    results = list(grade(concepts, pathlib.Path(args.input_dir), pathlib.Path(args.output_dir), clip))
    passed, total = sum(result["passed"] for result in results), len(results)
    print(f"You have passed {passed}/{total} cases")
    print(f"{passed} of {total} prompts reach both baselines")
    if args.json:
        save_json({"clip": args.clip, "prompts": results}, args.json)


if __name__ == "__main__":
    main()
