"""Defends: whatever a judge writes, it is a score only where it plainly is one, a refusal where it refuses, and else
unparseable. Every nasty reply that was ever thought of has its row here."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks.judge.protocol import Reply, outcome
from benchmarks.judge.reading import LONGEST_REPLY, declined, parse_reply, without_thoughts
from benchmarks.judge.refusals import refuses
from benchmarks.judge.wording import PREFERENCES

OBJECT = '{"score": [6, 7.5], "reasoning": "fine"}'
OTHER = '{"score": [1, 1], "reasoning": "a draft"}'
SCORES = (6.0, 7.5)

READ = {
    "clean": OBJECT,
    "fenced": f"```json\n{OBJECT}\n```",
    "fenced without a language": f"```\n{OBJECT}\n```",
    "prose around": f"Here it is: {OBJECT} Anything else?",
    "grades in the prose": f"I would give 3 for this and 4 for that, so: {OBJECT}",
    "an apostrophe before": f"Here's what I'd say: {OBJECT}",
    "a quotation mark before": f'The 15" screen is gone. {OBJECT}',
    "a bracket before that never closes": f"On [0, 10) I say {OBJECT}",
    "braces in the reasoning": '{"score": [6, 7.5], "reasoning": "the {cat} } is gone"}',
    "an open brace in the reasoning": '{"score": [6, 7.5], "reasoning": "it begins with {"}',
    "escaped quotes": '{"score": [6, 7.5], "reasoning": "the \\"cat\\" {"}',
    "a backslash at the end of a string": '{"score": [6, 7.5], "reasoning": "path\\\\"}',
    "trailing commas": '{"score": [6, 7.5,], "reasoning": "a, ]b",}',
    "line break in a string": '{"score": [6, 7.5], "reasoning": "one\ntwo"}',
    "tabs and line breaks between": '{\n\t"score": [\n\t\t6,\n\t\t7.5\n\t],\n\t"reasoning": "x"\n}',
    "Windows line ends": '{"score": [6,\r\n7.5],\r\n"reasoning": "x"}',
    "no reasoning": '{"score": [6, 7.5]}',
    "the reasoning first": '{"reasoning": "x", "score": [6, 7.5]}',
    "more keys": '{"score": [6, 7.5], "confidence": 3, "reasoning": "x"}',
    "nested": '{"score": [6, 7.5], "reasoning": {"a": {"score": [1, 1]}}}',
    "a null reasoning": '{"score": [6, 7.5], "reasoning": null}',
    "other decimals": '{"score": [6.0, 7.50]}',
    "an exponent": '{"score": [6e0, 75e-1]}',
    "the same object twice": f"{OBJECT}\n{OBJECT}",
    "equal scores in other words": f'{{"score": [6.0, 7.5], "reasoning": "first thoughts"}} so {OBJECT}',
    "an object without a score before": f'{{"seen": 2}} {OBJECT}',
    "a word in braces before": f"Both {{cats}} stay. {OBJECT}",
    "the form repeated before": f'As asked: {{"score": [a, b], "reasoning": "..."}}. {OBJECT}',
    "a list of one object": f"[{OBJECT}]",
    "a closing brace too many": f"{OBJECT}}}",
    "trailing {}": f"{OBJECT} {{}}",
    "trailing { }": f"{OBJECT}\n{{ }}\n",
    "leading {}": f"{{}} {OBJECT}",
    "strings": '{"score": ["6", "7.5"]}',
    "one string": '{"score": ["6", 7.5]}',
    "padded strings": '{"score": [" 6 ", "7.5 "]}',
    "a bare list": "[6, 7.5]",
    "a bare list of strings": '["6", "7.5"]',
    "a bare list in single quotes": "['6', '7.5']",
    "a fenced bare list": "```json\n[6, 7.5]\n```",
    "a bare list with blanks": " \n[ 6 , 7.5 ]\n ",
    "a bare list with a trailing comma": "[6, 7.5,]",
    "single quotes": "{'score': [6, 7.5], 'reasoning': 'fine'}",
    "single quotes around strings": "{'score': ['6', '7.5']}",
    "mixed quotes": "{'score': [6, 7.5], 'reasoning': \"the cat's hat\"}",
    "an escaped apostrophe": "{'score': [6, 7.5], 'reasoning': 'the cat\\'s hat'}",
    "double quotes in single ones": "{'score': [6, 7.5], 'reasoning': 'a \"red\" hat'}",
    "curly quotes": "{“score”: [6, 7.5], “reasoning”: “fine”}",
    "only closing curly quotes": "{”score”: [6, 7.5], ”reasoning”: ”fine”}",
    "low quotes": "{„score“: [6, 7.5], „reasoning“: „gut“}",
    "single curly quotes": "{‘score’: [6, 7.5], ‘reasoning’: ‘fine’}",
    "straight quotes in curly ones": '{“score”: [6, 7.5], “reasoning”: “a "red" hat”}',
    "curly quotes inside straight ones": '{"score": [6, 7.5], "reasoning": "a “red” hat"}',
    "a curly apostrophe inside": '{"score": [6, 7.5], "reasoning": "the cat’s hat"}',
    "braces in curly quotes": "{“score”: [6, 7.5], “reasoning”: “a } b”}",
    "no-break spaces": '{"score":\u00a0[6,\u00a07.5],\u00a0"reasoning":\u00a0"fine"}',
    "narrow and wide spaces": '{"score":\u202f[6,\u30007.5]}',
    "a no-break space inside a string": '{"score": [6, 7.5], "reasoning": "a\u00a0b"}',
    "a zero-width space": '{"score": [6, \u200b7.5]}',
    "a byte order mark": f"\ufeff{OBJECT}",
    "thoughts before": f"<think>maybe {OTHER}</think>{OBJECT}",
    "thoughts begun by the frame": f"maybe {OTHER}\n</think>\n\n{OBJECT}",
    "empty thoughts": f"<think>\n\n</think>\n\n{OBJECT}",
    "two thoughts": f"<think>{OTHER}</think> hm <think>{OTHER}</think> {OBJECT}",
    "thoughts that name their tag": f"<think>I must not write <think> {OTHER}</think>{OBJECT}",
    "thoughts after": f"{OBJECT}<think>was that right?</think>",
    "thoughts in capitals": f"<THINK>{OTHER}</THINK>{OBJECT}",
    "thinking": f"<thinking>{OTHER}</thinking>{OBJECT}",
    "a tag with an attribute": f'<think mode="deep">{OTHER}</think>{OBJECT}',
    "thoughts in brackets": f"[THINK]{OTHER}[/THINK]{OBJECT}",
    "thoughts in triangles": f"◁think▷{OTHER}◁/think▷{OBJECT}",
    "channels": f"<|channel|>analysis<|message|>{OTHER}<|end|><|start|>assistant<|channel|>final<|message|>{OBJECT}",
    "an answer tag": f"<answer>{OBJECT}</answer>",
    "a refusal in the thoughts": f"<think>I'm sorry, but I can't assist with that. Or can I?</think>{OBJECT}",
    "words of a refusal with scores": '{"score": [6, 7.5], "reasoning": "I cannot view the image in full size."}',
    "an apology with scores": f"Sorry for the delay. {OBJECT}",
    "long, but not too long": OBJECT + " " * (LONGEST_REPLY - len(OBJECT)),
}
UNREAD = {
    "empty": "",
    "blank": " \n\t ",
    "scalar": '{"score": 7, "reasoning": ""}',
    "one element": '{"score": [6]}',
    "three elements": '{"score": [6, 7, 8]}',
    "out of range": '{"score": [85, 7]}',
    "just out of range": '{"score": [10.01, 7]}',
    "negative": '{"score": [-1, 7]}',
    "a bare list of one": "[6]",
    "a bare list of three": "[6, 7, 8]",
    "a bare list in prose": "My grades are [6, 7.5].",
    "a scale in prose": "On [0, 10] that is good.",
    "a bare list and a refusal": "[6, 7] sorry, I can't help more",
    "two bare lists": "[6, 7]\n[6, 7]",
    "a bare list that is cut": "[6, 7.5",
    "a bare list of lists": "[[6, 7.5]]",
    "bare number": "7",
    "bare decimal": "7.5",
    "two bare numbers": "6, 7.5",
    "words": "six and seven",
    "a key without braces": '"score": [6, 7.5]',
    "cut off": '{"score": [6, 7.5], "reasoning": "fi',
    "cut off after the string": '{"score": [6, 7.5], "reasoning": "fine"',
    "cut off within the list": '{"score": [6, 7.',
    "the beginning is missing": 'ore": [6, 7.5], "reasoning": "fine"}',
    "an inner object of an unclosed one": f'{{"draft": {OBJECT}',
    "an inner object of an unclosed one, with more": f'{{"draft": {OBJECT}, "final": {{"score": [1,',
    "an inner object two levels down": f'{{"a": {{"b": {OBJECT}',
    "an open brace before": f"{{ well, {OBJECT}",
    "an inner object of an unclosed list": f"[{OBJECT}",
    "an inner object of an unclosed list, with more": f"[{OBJECT}, {{",
    "a cut object after a whole one": f'{OBJECT} and {{"score": [1,',
    "an inner object of a whole one": f'{{"answer": {OBJECT}}}',
    "two objects with different scores": f"{OTHER} no: {OBJECT}",
    "two objects, one score differs": f'{OBJECT} or {{"score": [6, 7]}}',
    "three objects, the middle differs": f"{OBJECT} {OTHER} {OBJECT}",
    "a list of different objects": f"[{OTHER}, {OBJECT}]",
    "a malformed object with another score before": f'{{"score": [1, 1], "reasoning": "the "cat""}} {OBJECT}',
    "scores before and after a thought": f"{OTHER}<think>no</think>{OBJECT}",
    "an object with a score by another name before": f'{{"scores": [1, 1]}} {OBJECT}',
    "inner quotes": '{"score": [6, 7.5], "reasoning": "the "cat" is gone"}',
    "inner quotes around braces": '{"score": [6, 7.5], "reasoning": "the "{cat}" is gone"}',
    "an inner apostrophe in single quotes": "{'score': [6, 7.5], 'reasoning': 'the cat's hat'}",
    "an inner curly apostrophe in single curly quotes": "{‘score’: [6, 7.5], ‘reasoning’: ‘the cat’s hat’}",
    "inner curly quotes in curly ones": "{“score”: [6, 7.5], “reasoning”: “the “cat” is gone”}",
    "no quotes": "{score: [6, 7.5]}",
    "Python's own values": "{'score': [6, 7.5], 'reasoning': None}",
    "no score": '{"grades": [6, 7.5]}',
    "another spelling": '{"scores": [6, 7.5]}',
    "a capital": '{"Score": [6, 7.5]}',
    "two keys": '{"score1": 6, "score2": 7.5}',
    "last object without score": f'{OBJECT} {{"note": 1}}',
    "unquoted list": '{"score": 6, 7}',
    "a text of a list": '{"score": "[6, 7.5]"}',
    "a tuple": '{"score": (6, 7.5)}',
    "fractions": '{"score": ["6/10", "7.5/10"]}',
    "fractions without quotes": '{"score": [6/10, 7.5/10]}',
    "percents": '{"score": ["60%", "75%"]}',
    "words in the list": '{"score": ["six", "seven"]}',
    "signed strings": '{"score": ["+6", "7"]}',
    "a decimal comma": '{"score": ["6", "7,5"]}',
    "a decimal comma without quotes": '{"score": [6, 7,5]}',
    "underscores": '{"score": ["1_0", "7"]}',
    "hexadecimal": '{"score": ["0x6", "7"]}',
    "other digits": '{"score": ["٦", "٧"]}',
    "full-width digits": '{"score": ["６", "７"]}',
    "an empty string": '{"score": ["", "7"]}',
    "a number torn by a space": '{"score": [1\u00a00, 7]}',
    "a number torn by a thought": '{"score": [1<think>hm</think>0, 7]}',
    "two numbers in a string": '{"score": ["6 7", "7"]}',
    "a range": '{"score": ["6-7", 7]}',
    "booleans": '{"score": [true, false]}',
    "nested lists": '{"score": [[6, 7]]}',
    "dict": '{"score": {"a": 6, "b": 7}}',
    "empty list": '{"score": []}',
    "null": '{"score": [null, 7]}',
    "nan": '{"score": [NaN, 7]}',
    "infinite": '{"score": [1e999, 7]}',
    "as many digits as fit": '{"score": [' + "9" * 5000 + ", 7]}",
    "a score twice": '{"score": [1, 1], "score": [9, 9]}',
    "a score twice in two kinds of quotes": "{\"score\": [1, 1], 'score': [9, 9]}",
    "the form echoed": '{"score": [a, b], "reasoning": "..."}',
    "empty braces": "{}",
    "a comment": '{"score": [6, 7.5] /* good */}',
    "many open braces": "{" * 5000,
    "many open brackets": "[" * 5000,
    "many quotation marks": "'\"“‘" * 4000,
    "many backslashes": '{"score": [6, 7.5], "reasoning": "' + "\\" * 10_001,
    "deeply nested": '{"score":' + "[" * 5000 + "]" * 5000 + "}",
    "a score inside thoughts": f"<think>{OBJECT}</think>",
    "a score inside thoughts, and words": f"<think>{OBJECT}</think> The edit is good.",
    "thoughts without an end": f"<think>I would say {OBJECT}",
    "thoughts without an end after a score": f"{OBJECT}<think>no, rather",
    "only the end of thoughts": f"{OBJECT}</think>",
    "a score inside an analysis channel": f"<|channel|>analysis<|message|>{OBJECT}<|end|>",
    "a bare list inside thoughts": "<think>[6, 7.5]</think>",
    "longer than is read": OBJECT + " " * (LONGEST_REPLY + 1 - len(OBJECT)),
    "longer than is read, the score last": "x" * LONGEST_REPLY + OBJECT,
    "a verdict in words": "The edit is good.",
}
REFUSALS = """
I'm sorry, but I can't assist with that.
I cannot assist with this request.
I am unable to evaluate images of people.
Sorry, I can't help with that.
Sorry, but can't help with that.
I won't rate images of real people.
I must decline.
I have to respectfully decline this request.
I’m not able to provide a rating for this content.
I'd rather not judge this picture.
I refuse.
As an AI language model, I don't have the ability to view images.
As an AI, I cannot see the images you uploaded.
I'm not comfortable rating these pictures.
I do not feel comfortable evaluating this content.
This violates our content policy.
This request goes against my guidelines.
Your request was flagged by our safety system.
That is not something I can help with.
Unfortunately, I cannot fulfil this request.
Unfortunately I can not complete this request.
I cannot rate this on a scale from 0 to 10.
I don't see any image attached.
I didn't receive any images.
No image was provided.
No image provided.
There are no images to evaluate.
No source or edited images were attached.
The images were not provided, so I cannot grade them.
The images did not load.
The image failed to load.
The image could not be loaded.
The second image is missing.
Please upload the images and I will grade them.
Could you please provide the two pictures?
Without the images, I cannot give a grade.
Only one image was provided.
I'm unable to view the images directly.
I cannot access the attached files.
Your message contains no images.
Sorry.
I'm sorry.
We are unable to process this image.
I can't do that.
It is beyond my capabilities to see images.
I do not have access to the images.
I can't make a judgement about these people.
I apologize, but I'm not able to evaluate this image.
I'm really sorry, but I can't process this request.
I'm afraid I can't help with this one.
I can’t evaluate this content as it may contain sensitive material.
My guidelines don't allow me to rate images of real people.
It appears that no images were attached to your message.
It seems like the image didn't upload properly.
There is no image in this conversation to evaluate.
You haven't provided any images.
I need the images in order to evaluate the edit.
Neither image was provided.
Both images are missing.
I can't view external images.
Image not provided.
No visual input was received.
I'm programmed to decline such requests.
I can't in good conscience rate this.
Content blocked by safety filter.
Scores cannot be given because no images could be seen.
Evaluation not possible because no image was given.
Es tut mir leid, aber ich kann dabei nicht helfen.
Leider kann ich dieses Bild nicht bewerten.
Das kann ich leider nicht beurteilen.
Es wurde kein Bild bereitgestellt.
Bitte laden Sie die Bilder hoch.
Ich kann keine Bilder sehen.
Je suis désolé, mais je ne peux pas vous aider.
Je ne peux pas évaluer cette image.
Aucune image n'a été fournie.
Veuillez fournir les images.
Lo siento, no puedo ayudar con eso.
No puedo evaluar esta imagen.
No se proporcionó ninguna imagen.
Desculpe, não posso ajudar com isso.
Não posso avaliar esta imagem.
Nenhuma imagem foi fornecida.
Mi dispiace, ma non posso aiutarti.
Non sono in grado di valutare questa immagine.
Nessuna immagine è stata fornita.
Het spijt me, maar ik kan hier niet bij helpen.
Ik kan deze afbeelding niet beoordelen.
Er is geen afbeelding bijgevoegd.
Tyvärr kan jag inte hjälpa till med det.
Jeg kan desværre ikke hjælpe med det.
Jeg kan ikke vurdere dette bildet.
Valitettavasti en voi auttaa tässä.
Przepraszam, nie mogę w tym pomóc.
Nie mogę ocenić tego obrazu.
Nie dostarczono obrazu.
Omlouvám se, ale s tím nemohu pomoci.
Sajnálom, ebben nem segíthetek.
Îmi pare rău, nu pot ajuta cu asta.
Λυπάμαι, δεν μπορώ να βοηθήσω με αυτό.
Üzgünüm, bu konuda yardımcı olamam.
Bu görüntüyü değerlendiremem.
Bunu değerlendiremiyorum.
Извините, я не могу помочь с этим.
Я не могу оценить это изображение.
К сожалению, я не могу выполнить ваш запрос.
Изображения не были предоставлены.
Вибачте, я не можу допомогти з цим.
عذرًا، لا أستطيع المساعدة في هذا الطلب.
لا يمكنني تقييم هذه الصورة.
אני מצטער, איני יכול לעזור בזה.
متأسفم، نمی‌توانم در این مورد کمک کنم.
क्षमा करें, मैं इसमें सहायता नहीं कर सकता।
Xin lỗi, tôi không thể giúp với yêu cầu này.
Tôi không thể đánh giá hình ảnh này.
Maaf, saya tidak dapat membantu dengan permintaan ini.
ขออภัย ฉันไม่สามารถช่วยเรื่องนี้ได้
抱歉，我无法协助处理这个请求。
对不起，我不能评价这张图片。
很抱歉，我无法查看图片。
抱歉，我無法評估這張圖像。
我没有看到图片，请上传图片。
没有提供图片，无法评分。
图片未提供。
我无法看到您上传的图片。
申し訳ありませんが、そのご要望にはお応えできません。
この画像を評価することはできません。
画像が提供されていません。
画像を確認できません。
죄송합니다. 이 요청은 도와드릴 수 없습니다.
이 이미지를 평가할 수 없습니다.
이미지가 제공되지 않았습니다.
이미지를 볼 수 없습니다.
Es sind keine Bilder angehängt.
Ich bin nicht in der Lage, Bilder zu bewerten.
Je n'ai pas accès aux images.
Les images n'ont pas été fournies.
Lo lamento, pero no puedo cumplir con esta solicitud.
No he recibido ninguna imagen.
Não recebi nenhuma imagem.
Non vedo alcuna immagine allegata.
无法评分，因为没有图片。
您没有上传图片。
すみません、画像を見ることができません。
画像をアップロードしてください。
이미지를 제공해 주세요.
Вы не прикрепили изображение.
Bu isteğe yardımcı olamıyorum.
""".strip().splitlines()
BAD_GRADES = """
The edit is fine.
The edited image is identical to the source; nothing was changed.
I cannot see any difference between the two images.
I can't see any hat in the result.
The program could not add the hat.
The model failed to provide the requested edit.
I can't help but notice that nothing was changed.
I can't help noticing that nothing was changed.
I cannot rate this higher, because nothing changed.
I cannot give it a better score.
I'm sorry, but nothing was changed here.
The image is missing the hat.
The second image is missing the requested dog.
No hat was provided in the result.
No image of a dog is visible in the result.
The picture frame was not included.
I cannot see the image's hat.
I can't see the picture frame.
The edit does not follow the given image.
The requested object cannot be found in the image.
Nothing that was asked for is there; the result shows a different scene.
The instruction was ignored.
I do not see the requested change.
The edit goes against the instruction.
The result is unable to convey the requested style.
Unable to find the requested change.
The edited image can't be considered a success.
I was not able to find any change.
We see no change.
The image does not provide the requested text.
The file cabinet was not removed.
The image is not available in colour anymore.
The picture was not provided with a hat.
The photo does not load any new object.
Nothing in the image changed, so the edit failed completely.
There is no cat in the image and no hat was added.
The images are unrelated.
I would rate this edit very poorly.
The original image was not preserved.
It is impossible to recognise the source image.
We are given a completely different scene.
Das Bild ist unverändert, der Hut fehlt.
Ich kann keinen Hut im Bild sehen.
Je ne vois aucune différence.
L'image n'a pas été modifiée.
Je ne peux voir aucun chapeau sur l'image.
No puedo ver ningún cambio.
No hay ninguna imagen de un gato.
Não vejo nenhuma mudança.
Non vedo alcun cambiamento.
Ik zie geen verschil.
Я не вижу изменений.
Изображение не было изменено.
图片没有任何变化，帽子没有出现。
我无法看到图片中的帽子。
模型未能完成编辑任务。
很遗憾，编辑没有满足要求。
未提供图片中要求的帽子。
変更が確認できません。
帽子は追加されていません。
변화를 볼 수 없습니다.
모자가 추가되지 않았습니다.
Die Bearbeitung wurde nicht durchgeführt.
No se ve ningún cambio en la imagen.
L'immagine non è stata modificata.
编辑后的图片与原图相同。
画像に帽子がありません。
Görüntüde değişiklik yok.
""".strip().splitlines()
ALSO_REFUSED = {
    "a refusal with an object of no scores": '{"score": null, "reasoning": "I cannot assist with that."}',
    "a refusal with an empty list": '{"score": [], "reasoning": "No image was provided."}',
    "a refusal with words for scores": '{"score": ["N/A", "N/A"], "reasoning": "I cannot see the images."}',
    "an error as an object": '{"error": "I\'m sorry, but I can\'t assist with that."}',
    "a refusal after thoughts": "<think>They ask for 2 grades.</think>I'm sorry, but I can't assist with that.",
    "a refusal before two zeros": 'I\'m unable to view images. {"score": [0, 0], "reasoning": ""}',
    "a refusal after two zeros": '{"score": [0, 0]}\nNo image was provided.',
    "a refusal in a nested reasoning": '{"score": [0, 0], "reasoning": {"a": "No image was provided."}}',
    "zeros as strings": '{"score": ["0", "0"], "reasoning": "No image was provided."}',
    "zeros with decimals": '{"score": [0.0, 0.0], "reasoning": "I can\'t assist with that."}',
    "fenced zeros": '```json\n{"score": [0, 0], "reasoning": "The images were not attached."}\n```',
    "zeros in single quotes": "{'score': [0, 0], 'reasoning': 'No image was provided.'}",
}


CHOICES = {
    "A": [
        '{"winner": "A", "reasoning": "the hat is red"}',
        'Well. ```json\n{"winner": "a"}\n``` That is all.',
        '{"winner": "Image A"}',
        '{"winner": "image_a"}',
        '{"winner": "Result A wins."}',
        '{"winner": "**A**"}',
        "{'winner': 'A'}",
        "{“winner”: “A”}",
        '{"winner":\u00a0"A"} {}',
        "A",
        "**A**",
        '"A".',
        '<think>{"winner": "B"}</think>{"winner": "A"}',
        '{"winner": "A", "reasoning": "In B I cannot view the images of the sign."}',
        '{"winner": "A", "reasoning": "first"} {"winner": "a", "reasoning": "again"}',
    ],
    "B": ['{"winner": "B"}', "b", '{"reasoning": "A is worse", "winner": "picture B"}'],
    "tie": [
        '{"winner": "tie"}',
        '{"winner": "Tie", "reasoning": "I cannot see any difference."}',
        '{"winner": "both"}',
        '{"winner": "Neither."}',
        '{"winner": "equal"}',
        "tie",
        "TIE.",
    ],
    "unparseable": [
        "",
        "A is better",
        "A, B",
        "A or B",
        "C",
        "1",
        '{"winner": "C"}',
        '{"winner": "A or B"}',
        '{"winner": "not A"}',
        '{"winner": 1}',
        '{"winner": null}',
        '{"winner": ["A"]}',
        '{"winner": true}',
        '{"winner": "first"}',
        '{"score": [8, 6]}',
        '{"winner": "A"',
        '{"draft": {"winner": "A"}',
        '{"draft": {"winner": "A"}}',
        '{"winner": "A"} {"winner": "B"}',
        '{"winner": "A", "winner": "B"}',
        '<think>{"winner": "A"}</think>',
        '<think>{"winner": "A"}',
        '{"winner": "A" | "B" | "tie"}',
        '{"winner": "A", "reasoning": "the "hat""}',
        '{"winner": "A"} {"note": "B"}',
        '{"winner": "A"}' + " " * LONGEST_REPLY,
    ],
    "refused": [
        REFUSALS[0],
        '{"winner": "tie", "reasoning": "No image was provided."}',
        'I cannot view images. {"winner": "neither"}',
        '{"winner": "none", "reasoning": "抱歉，我无法查看图片。"}',
        '{"winner": null, "reasoning": "I\'m sorry, but I can\'t assist with that."}',
    ],
}
SHARES = {"A": (1.0,), "B": (0.0,), "tie": (0.5,)}


@pytest.mark.parametrize(("meant", "text"), [(meant, text) for meant, texts in CHOICES.items() for text in texts])
def test_a_preference_is_read_or_it_is_none(meant: str, text: str) -> None:
    for kind in PREFERENCES:
        found = outcome([Reply("ok", text, finish_reason="stop")], kind)
        assert (found.status, found.scores) == (("ok", SHARES[meant]) if meant in SHARES else (meant, ()))
        assert outcome([Reply("ok", text, finish_reason="length")], kind).status == "unparseable"


def read(text: str, finish: str = "stop") -> tuple[str, tuple[float, ...]]:
    found = outcome([Reply("ok", text, finish_reason=finish)])
    assert (found.status == "ok") == bool(found.scores) == (not found.fault)
    return found.status, found.scores


@pytest.mark.parametrize("name", READ)
def test_a_plain_reply_is_read_whatever_its_dress(name: str) -> None:
    assert read(READ[name]) == ("ok", SCORES)


@pytest.mark.parametrize("name", UNREAD)
def test_anything_else_has_no_score(name: str) -> None:
    assert read(UNREAD[name]) == ("unparseable", ())


@pytest.mark.parametrize("name", ALSO_REFUSED)
def test_a_refusal_may_be_dressed_as_an_answer(name: str) -> None:
    assert read(ALSO_REFUSED[name]) == ("refused", ())


@pytest.mark.parametrize("words", REFUSALS)
def test_a_refusal_is_one_in_any_words_and_language(words: str) -> None:
    zeros = json.dumps({"score": [0, 0], "reasoning": words})
    assert {read(words), read(f"{words}\n"), read(zeros)} == {("refused", ())}
    assert read(json.dumps({"score": [0, 0], "reasoning": words}, ensure_ascii=False)) == ("refused", ())
    assert read(json.dumps({"score": [0, 5], "reasoning": words})) == ("ok", (0.0, 5.0))


@pytest.mark.parametrize("words", BAD_GRADES)
def test_the_reason_of_a_bad_grade_is_no_refusal(words: str) -> None:
    assert read(json.dumps({"score": [0, 0], "reasoning": words})) == ("ok", (0.0, 0.0))
    assert read(words) == ("unparseable", ())


@pytest.mark.parametrize("finish", ["length", "LENGTH", "max_tokens", "MAX_TOKENS", "model_length"])
@pytest.mark.parametrize("text", [OBJECT, f"{OBJECT} and", '{"score": [6, 7.5], "rea', REFUSALS[0], ""])
def test_a_reply_that_its_limit_has_ended_is_none(finish: str, text: str) -> None:
    assert read(text, finish) == ("unparseable", ())
    assert "limit" in outcome([Reply("ok", text, finish_reason=finish)]).fault


@pytest.mark.parametrize("finish", ["", "stop", "STOP", "end_turn", "eos"])
def test_a_reply_that_has_ended_by_itself_is_read(finish: str) -> None:
    assert read(OBJECT, finish) == ("ok", SCORES)


def test_a_grade_in_words_keeps_a_reply_from_being_a_refusal() -> None:
    assert not declined("Sorry, I can't provide details, but I rate it 7 of 10")
    assert not declined("Sorry, I can't provide details, but it earns 7/10")
    assert declined("I can't rate this from 0 to 10.") and declined("我无法从0到10评分")


def test_thoughts_are_what_their_tags_enclose() -> None:
    assert without_thoughts("a") == "a" and without_thoughts("a<think>b</think>c") == "a\nc"
    assert without_thoughts("b</think>c") == "c" and without_thoughts("a<think>b") is None


def test_no_reply_takes_long_to_read() -> None:
    """Marks that the readers look for, repeated to the longest text."""
    marks = ["{", "{}", "[", '"', "'", "“", "\\", "<think>", "</think>", "i can't ", "no image ", "0 to "]
    texts = [mark * (LONGEST_REPLY // len(mark)) for mark in marks]
    begun = time.process_time()
    for text in texts:
        parse_reply(text)
        parse_reply('{"score": [0, 0], "reasoning": "' + text[: LONGEST_REPLY - 40].replace('"', "") + '"}')
        declined(text)
    assert time.process_time() - begun < 10.0


def test_what_a_judge_says_of_itself_is_folded_first() -> None:
    assert refuses("I CAN’T   ASSIST\nwith that") and not refuses("i can tassist")
