"""Grades Textual Inversion as the course does: CLIP ViT-B/32, the best 5 of 25 pictures a prompt.

    python3 evaluation/grade_hw2_3.py --json_path hw2_data/textual_inversion/input.json \
        --input_dir hw2_data/textual_inversion --output_dir output

Image score: 100 * mean cosine to the source images. Text score: CLIP's logit (100 * cosine) for prompt_4_clip_eval.
The five with the largest image + 2.5 * text are averaged; both averages must reach the JSON's baseline.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from p3_clip import best_fifth, image_scores, load_clip, text_scores  # noqa: E402
from p3_concepts import GRADED_TYPES, image_files, read_concepts  # noqa: E402
from utils import UserError, cli, pick_device  # noqa: E402

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
    """Prints each prompt's scores; returns (prompts that reach both baselines, prompts)."""
    passed = total = 0
    folders = {c.key: [generated(output_dir / c.key / str(i)) for i in range(len(c.prompts))] for c in concepts}
    for concept in concepts:
        sources = clip.images(image_files(input_dir / concept.key))
        for i, files in enumerate(folders[concept.key]):
            pictures = clip.images(files)
            text = text_scores(clip, pictures, concept.eval_prompts[i])
            image, text = best_fifth(image_scores(clip, pictures, sources), text)
            baseline = concept.baseline[i] if concept.baseline else None
            good = bool(baseline) and image >= baseline[0] and text >= baseline[1]
            passed, total = passed + good, total + 1
            print(f'source {concept.key} prompt {i} "{concept.prompts[i]}":')
            print(course_lines(image, text, baseline, good), flush=True)
    return passed, total


def course_lines(image, text, baseline, good):
    """One prompt's result in the words of the course's grader, which other scripts look for."""
    lines = [f"CLIP Image Score: {image:.2f}", f"CLIP Text Score: {text:.2f}"]
    if baseline:
        lines.append(f"{'PASS' if good else 'Fail!'} Baseline is {baseline[0]:.2f}/{baseline[1]:.2f}")
    return "\n".join(lines)


@cli
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json_path", required=True, help="the JSON with prompts and baselines")
    parser.add_argument("--input_dir", required=True, help="the folder with the source images, one subfolder a concept")
    parser.add_argument("--output_dir", required=True, help="what hw2_3.sh wrote")
    parser.add_argument("--clip", default="ViT-B/32", help="OpenAI or hub name, folder, or file in OpenAI's format")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    concepts = read_concepts(args.json_path)
    for concept in concepts:
        if not concept.eval_prompts:
            raise UserError(f'{args.json_path}: entry "{concept.key}" needs the key "prompt_4_clip_eval" to be graded')
    clip = load_clip(args.clip, pick_device(args.device))
    passed, total = grade(concepts, pathlib.Path(args.input_dir), pathlib.Path(args.output_dir), clip)
    print(f"You have passed {passed}/{total} cases")
    print(f"{passed} of {total} prompts reach both baselines")


if __name__ == "__main__":
    main()
